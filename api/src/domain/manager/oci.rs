//! Unpacking an OCI image, in a sandbox of its own.
//!
//! ```text
//! archive ─► scan (digests, paths, whiteouts) ─► tar file ─► stdin of tar, in the guest ─► /dev/vdb
//!            for each layer, bottom first         again, as bytes
//! ```
//!
//! The guest has the image's disk as its second one, and unpacks with a tar of its own in a root that
//! is this disk: links lead nowhere else, and what an archive can break is the machine that is made
//! for it. This side passes bytes on, and never makes a file of a name from an archive.

use std::collections::BTreeMap;
use std::io::{self, Write};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::mpsc;

use super::super::build::Progress;
use super::super::error::TemplateError;
use super::super::host::ExecRequest;
use super::super::id::SandboxId;
use super::super::request;
use super::super::template::{Settings, Source};
use super::Manager;
use super::builds::{BuildError, run_to_end};
use crate::chain;
use crate::oci::{Directories, Image, ImageArchive, LayerBlob, LayerScan, OciError, Whiteout};

/// Where the root of the machine that unpacks is, in that of the image, while it does.
const RESERVED: &str = ".builder";
/// How long one command may take in the machine that unpacks, in seconds.
const COMMAND_SEC: u32 = 3600;
/// Pieces of a layer that wait for the guest to take them.
const PIECES_IN_FLIGHT: usize = 2;

/// Mounts the image's disk, and in there the root that has the programs.
const MOUNT: &str = "mount -t ext4 /dev/vdb /mnt && mkdir /mnt/.builder && \
                     mount --bind -o ro / /mnt/.builder && mount -o remount,ro,bind /mnt/.builder";
/// Takes all of that away again.
const UNMOUNT: &str = "umount /mnt/.builder && rmdir /mnt/.builder && umount /mnt";
/// A program of the machine that unpacks, run in the root of the image: nothing there is executed.
const PROGRAM: &str = "b=/.builder; run() { p=$1; shift; \
                       $b/lib64/ld-linux-x86-64.so.2 --library-path \
                       $b/usr/lib/x86_64-linux-gnu $b/usr/bin/$p \"$@\"; }; ";
/// Removes what the whiteouts on standard input say: pairs of a word and a path, with a zero byte
/// after each.
const REMOVE: &str = "while IFS= read -r -d '' what && IFS= read -r -d '' path; do case $what in \
                      path) run rm -rf -- \"./$path\" ;; \
                      content) [ ! -d \"./$path\" ] || [ -L \"./$path\" ] || \
                      run find \"./$path\" -mindepth 1 -maxdepth 1 ! -path ./.builder \
                      -exec $b/lib64/ld-linux-x86-64.so.2 --library-path \
                      $b/usr/lib/x86_64-linux-gnu $b/usr/bin/rm -rf -- {} + ;; \
                      esac || exit; done";
/// Unpacks the tar file on standard input. Absolute paths and links are those of the image: its root
/// is the root.
const UNPACK: &str = "run tar --extract --file=- --absolute-names --numeric-owner --same-owner \
                      --same-permissions --xattrs --xattrs-include='*' --delay-directory-restore \
                      --exclude='.wh.*' --warning=no-timestamp";

/// An image that is to be unpacked.
#[derive(Debug)]
pub struct OciBuild {
    image: Image,
    disk_mb: u32,
}

impl OciBuild {
    /// The template that images are unpacked in: it has a shell, mount, tar and find.
    pub const BUILDER: &'static str = "minimal";

    /// The image in an archive, and what it says of sandboxes, for `settings`.
    ///
    /// # Errors
    /// There is none, or it makes no sense.
    pub async fn new(
        archive: std::fs::File,
        disk_mb: u32,
        settings: &mut Settings,
    ) -> Result<Self, TemplateError> {
        let found = tokio::task::spawn_blocking(move || {
            ImageArchive::open(archive).and_then(|archive| Image::find(&archive))
        });
        let image = found.await.map_err(|_| TemplateError::Interrupted)?;
        let image = image.map_err(|error| TemplateError::Invalid(chain(&error)))?;
        let mut env = BTreeMap::new();
        for variable in &image.env {
            if let Some((name, value)) = variable.split_once('=') {
                env.insert(name.to_owned(), value.to_owned());
            }
        }
        env.append(&mut settings.env);
        request::check_env(&env).map_err(TemplateError::Invalid)?;
        settings.env = env;
        if settings.cwd.is_none()
            && let Some(cwd) = &image.cwd
        {
            request::check_path(cwd)
                .map_err(|problem| TemplateError::Invalid(format!("WorkingDir: {problem}")))?;
            settings.cwd = Some(cwd.clone());
        }
        settings.user.clone_from(&image.user);
        settings.entrypoint.clone_from(&image.entrypoint);
        settings.cmd.clone_from(&image.cmd);
        Ok(Self { image, disk_mb })
    }

    /// What the template is made from.
    pub fn source(&self) -> Source {
        Source::Oci {
            image: self.image.id.clone(),
            reference: self.image.name.clone(),
        }
    }

    /// The size of its disk, in MiB.
    pub fn disk_mb(&self) -> u32 {
        self.disk_mb
    }

    /// How many bytes the tar files of all layers may have: one may replace what another brings.
    fn most(&self) -> u64 {
        u64::from(self.disk_mb) << 21
    }
}

impl Manager {
    /// Unpacks an image to the second disk of a sandbox.
    pub(super) async fn unpack(
        &self,
        build: OciBuild,
        builder: &SandboxId,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        let mut directories = Directories::default();
        let mut left = build.most();
        let count = build.image.layers.len();
        self.in_builder(builder, MOUNT, "mounting the disk", None, progress)
            .await?;
        for (index, layer) in build.image.layers.iter().enumerate() {
            let what = format!("layer {} of {count}", index + 1);
            progress.say(&format!("{what}: checking {}", layer.name()));
            let (scan, below) = scan(layer.clone(), left, directories).await?;
            directories = below;
            left = left.saturating_sub(scan.bytes);
            progress.say(&format!(
                "{what}: {} entries, {} bytes, {} whiteouts",
                scan.entries,
                scan.bytes,
                scan.whiteouts.len()
            ));
            if !scan.whiteouts.is_empty() {
                let list = list_of(&scan.whiteouts);
                let input = stream::iter([Ok(Bytes::from(list))]).boxed();
                let doing = format!("removing whiteouts of {what}");
                let script = format!("{PROGRAM}{REMOVE}");
                self.in_root(builder, &script, &doing, input, progress)
                    .await?;
            }
            let input = tar_of(layer.clone(), scan.bytes);
            let script = format!("{PROGRAM}{UNPACK}");
            self.in_root(
                builder,
                &script,
                &format!("unpacking {what}"),
                input,
                progress,
            )
            .await?;
        }
        self.in_builder(builder, UNMOUNT, "unmounting the disk", None, progress)
            .await
    }

    /// Runs a script in the root of the image, with the shell of the machine that unpacks.
    async fn in_root(
        &self,
        builder: &SandboxId,
        script: &str,
        what: &str,
        input: BoxStream<'static, io::Result<Bytes>>,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        // Nothing of the image is executed: neither its shell nor its loader.
        let shell = "exec chroot /mnt /.builder/lib64/ld-linux-x86-64.so.2 --library-path \
                     /.builder/usr/lib/x86_64-linux-gnu /.builder/usr/bin/bash -c \"$0\"";
        let argv = ["/bin/sh", "-c", shell, script].map(str::to_owned).to_vec();
        self.run_in_builder(builder, argv, what, Some(input), progress)
            .await
    }

    async fn in_builder(
        &self,
        builder: &SandboxId,
        script: &str,
        what: &str,
        input: Option<BoxStream<'static, io::Result<Bytes>>>,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        let argv = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        self.run_in_builder(builder, argv, what, input, progress)
            .await
    }

    async fn run_in_builder(
        &self,
        builder: &SandboxId,
        argv: Vec<String>,
        what: &str,
        input: Option<BoxStream<'static, io::Result<Bytes>>>,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        let request = ExecRequest {
            argv,
            env: BTreeMap::new(),
            cwd: Some("/".to_owned()),
            timeout_sec: COMMAND_SEC,
        };
        let host = &self.inner.host;
        let events = match input {
            Some(input) => host.exec_with_input(builder, request, input).await?,
            None => host.exec(builder, request).await?,
        };
        run_to_end(events, what, COMMAND_SEC, progress).await
    }
}

async fn scan(
    layer: LayerBlob,
    most: u64,
    mut below: Directories,
) -> Result<(LayerScan, Directories), BuildError> {
    let scanned = tokio::task::spawn_blocking(move || {
        let scan = layer.scan(most, RESERVED, &mut below)?;
        Ok((scan, below))
    });
    let scanned = scanned.await;
    Ok(scanned.unwrap_or_else(|error| Err(OciError::Read(io::Error::other(error))))?)
}

/// Whiteouts, as the script reads them.
fn list_of(whiteouts: &[Whiteout]) -> Vec<u8> {
    let mut list = Vec::new();
    for whiteout in whiteouts {
        let (what, path) = match whiteout {
            Whiteout::Path(path) => ("path", path),
            Whiteout::Content(path) => ("content", path),
        };
        list.extend_from_slice(what.as_bytes());
        list.push(0);
        list.extend_from_slice(path);
        list.push(0);
    }
    list
}

/// The tar file of a layer, which has so many bytes, as it is read.
fn tar_of(layer: LayerBlob, bytes: u64) -> BoxStream<'static, io::Result<Bytes>> {
    struct Pieces(mpsc::Sender<io::Result<Bytes>>);
    impl Write for Pieces {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            // Whoever has gone away needs no more.
            let piece = Ok(Bytes::copy_from_slice(buffer));
            let sent = self.0.blocking_send(piece);
            sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(buffer.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (sender, receiver) = mpsc::channel(PIECES_IN_FLIGHT);
    tokio::task::spawn_blocking(move || {
        let mut pieces = Pieces(sender);
        if let Err(error) = layer.copy(bytes, &mut pieces) {
            let _ = pieces.0.blocking_send(Err(io::Error::other(chain(&error))));
        }
    });
    stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    })
    .boxed()
}
