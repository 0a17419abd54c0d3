//! From the index of an image to its layers and its configuration.

use oci_spec::image::{
    Arch, Descriptor, Digest, DigestAlgorithm, ImageConfiguration, ImageIndex, ImageManifest, Os,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{ImageArchive, OciError};
use crate::archive::Section;

/// The most layers of an image; Docker takes 127.
pub const MAX_LAYERS: usize = 256;
/// How many indexes may lead from one to the next.
const MAX_INDEXES: usize = 4;
/// The most entries of an index that are looked at.
const MAX_MANIFESTS: usize = 1000;

/// What an index refers to by these types is an index, too.
const INDEXES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// Where archives have the name of an image.
const NAMES: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];

/// An image, as far as its documents tell.
#[derive(Debug)]
pub struct Image {
    /// SHA-256 of its configuration, as in `sha256:…`, which is what Docker calls its id.
    pub id: String,
    /// The name that the archive gives it.
    pub name: Option<String>,
    /// Its layers, bottom first.
    pub layers: Vec<LayerBlob>,
    /// Environment of its program, as `NAME=VALUE`.
    pub env: Vec<String>,
    /// Working directory of its program.
    pub cwd: Option<String>,
    /// User of its program.
    pub user: Option<String>,
    /// Its program.
    pub entrypoint: Vec<String>,
    /// Arguments, or the program if there is no entrypoint.
    pub cmd: Vec<String>,
}

/// A layer of an image.
#[derive(Debug, Clone)]
pub struct LayerBlob {
    /// Its content, as it is in the archive.
    pub content: Section,
    /// SHA-256 of that, as hexadecimal digits, where the image tells it.
    pub digest: Option<String>,
    /// SHA-256 of the tar file in it, as hexadecimal digits.
    pub diff_id: String,
}

impl Image {
    /// The image in an archive, for this kind of machine. This blocks. The contents of its layers
    /// are not looked at yet.
    ///
    /// # Errors
    /// There is none, or more than one, or it makes no sense.
    pub fn find(archive: &ImageArchive) -> Result<Self, OciError> {
        if archive.find("index.json").is_some() {
            Self::of_layout(archive)
        } else if archive.find("manifest.json").is_some() {
            Self::of_docker(archive)
        } else {
            Err(OciError::NoImage)
        }
    }

    fn of_layout(archive: &ImageArchive) -> Result<Self, OciError> {
        let index = archive.document("index.json")?;
        let mut found = Found::default();
        collect(archive, &index, "index.json", 0, None, &mut found)?;
        let (descriptor, name) = match found.manifests.len() {
            0 => return Err(OciError::Platform(found.platforms())),
            1 => found.manifests.remove(0),
            count => return Err(OciError::SeveralImages(count)),
        };
        let (json, what) = blob(archive, &descriptor)?;
        let manifest =
            ImageManifest::from_reader(&json[..]).map_err(|error| document(&what, &error))?;
        let (config, _) = blob(archive, manifest.config())?;
        let id = manifest.config().digest().to_string();
        let mut blobs = Vec::new();
        for layer in manifest.layers().iter().take(MAX_LAYERS + 1) {
            let digest = sha256_of(layer.digest())?;
            let content = archive.get(&format!("blobs/sha256/{digest}"))?;
            if content.left() != layer.size() {
                return Err(OciError::Document {
                    what: format!("the size of layer {digest}"),
                    problem: format!("it is {}, and not {}", content.left(), layer.size()),
                });
            }
            blobs.push((content, Some(digest.to_owned())));
        }
        Self::of_config(&config, id, name, blobs)
    }

    fn of_docker(archive: &ImageArchive) -> Result<Self, OciError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Saved {
            config: String,
            repo_tags: Option<Vec<String>>,
            layers: Vec<String>,
        }
        let json = archive.document("manifest.json")?;
        let mut saved: Vec<Saved> =
            serde_json::from_slice(&json).map_err(|error| document("manifest.json", &error))?;
        let image = match saved.len() {
            1 => saved.remove(0),
            0 => return Err(OciError::NoImage),
            count => return Err(OciError::SeveralImages(count)),
        };
        let config = archive.document(&image.config)?;
        let digest = crate::hex(&Sha256::digest(&config));
        // It is named by its digest.
        let name = image.config.rsplit('/').next().unwrap_or_default();
        let name = name.strip_suffix(".json").unwrap_or(name);
        if name.len() == digest.len() && name != digest {
            return Err(OciError::Digest {
                expected: name.to_owned(),
                what: image.config,
                found: digest,
            });
        }
        let mut blobs = Vec::new();
        for layer in image.layers.iter().take(MAX_LAYERS + 1) {
            blobs.push((archive.get(layer)?, None));
        }
        let tags = image.repo_tags.unwrap_or_default();
        let name = tags.into_iter().next();
        Self::of_config(&config, format!("sha256:{digest}"), name, blobs)
    }

    fn of_config(
        json: &[u8],
        id: String,
        name: Option<String>,
        blobs: Vec<(Section, Option<String>)>,
    ) -> Result<Self, OciError> {
        if blobs.len() > MAX_LAYERS {
            return Err(OciError::TooManyLayers(blobs.len()));
        }
        let what = "the configuration";
        let config =
            ImageConfiguration::from_reader(json).map_err(|error| document(what, &error))?;
        if *config.os() != Os::Linux || *config.architecture() != Arch::Amd64 {
            let platform = format!("{}/{}", config.os(), config.architecture());
            return Err(OciError::Platform(platform));
        }
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != blobs.len() {
            return Err(OciError::Document {
                what: what.to_owned(),
                problem: format!(
                    "it tells of {} layers, and the manifest of {}",
                    diff_ids.len(),
                    blobs.len()
                ),
            });
        }
        let mut layers = Vec::new();
        for (diff_id, (content, digest)) in diff_ids.iter().zip(blobs) {
            let diff_id: Digest = diff_id.parse().map_err(|error| document(what, &error))?;
            layers.push(LayerBlob {
                content,
                digest,
                diff_id: sha256_of(&diff_id)?.to_owned(),
            });
        }
        let config = config.config().clone().unwrap_or_default();
        let not_empty = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        Ok(Self {
            id,
            name,
            layers,
            env: config.env().clone().unwrap_or_default(),
            cwd: not_empty(config.working_dir()),
            user: not_empty(config.user()),
            entrypoint: config.entrypoint().clone().unwrap_or_default(),
            cmd: config.cmd().clone().unwrap_or_default(),
        })
    }
}

/// What indexes refer to.
#[derive(Default)]
struct Found {
    /// Manifests for this kind of machine, each once, with the names of their images.
    manifests: Vec<(Descriptor, Option<String>)>,
    /// What there is for others.
    others: Vec<String>,
    /// How many entries were looked at.
    seen: usize,
}

impl Found {
    fn platforms(&self) -> String {
        match self.others.as_slice() {
            [] => "nothing".to_owned(),
            others => others.join(", "),
        }
    }
}

/// Collects the manifests that an index refers to.
fn collect(
    archive: &ImageArchive,
    json: &[u8],
    what: &str,
    depth: usize,
    name: Option<&str>,
    found: &mut Found,
) -> Result<(), OciError> {
    if depth >= MAX_INDEXES {
        return Err(OciError::Document {
            what: what.to_owned(),
            problem: "it is an index in an index in an index".to_owned(),
        });
    }
    let index = ImageIndex::from_reader(json).map_err(|error| document(what, &error))?;
    for descriptor in index.manifests() {
        found.seen += 1;
        if found.seen > MAX_MANIFESTS {
            return Err(OciError::Document {
                what: what.to_owned(),
                problem: format!("it refers to more than {MAX_MANIFESTS} manifests"),
            });
        }
        let own = descriptor.annotations().as_ref().and_then(|annotations| {
            NAMES
                .iter()
                .find_map(|name| annotations.get(*name).cloned())
        });
        let name = own.as_deref().or(name);
        if INDEXES.contains(&descriptor.media_type().to_string().as_str()) {
            let (json, what) = blob(archive, descriptor)?;
            collect(archive, &json, &what, depth + 1, name, found)?;
            continue;
        }
        match descriptor.platform() {
            Some(platform)
                if *platform.os() != Os::Linux || *platform.architecture() != Arch::Amd64 =>
            {
                // As attestations are, whose platform is unknown/unknown.
                let platform = format!("{}/{}", platform.os(), platform.architecture());
                if found.others.len() < 10 {
                    found.others.push(platform);
                }
            }
            _ => {
                let is_known = |(other, _): &(Descriptor, _)| other.digest() == descriptor.digest();
                if !found.manifests.iter().any(is_known) {
                    let name = name.map(str::to_owned);
                    found.manifests.push((descriptor.clone(), name));
                }
            }
        }
    }
    Ok(())
}

/// A document by its digest, and what to call it.
fn blob(archive: &ImageArchive, descriptor: &Descriptor) -> Result<(Vec<u8>, String), OciError> {
    let digest = sha256_of(descriptor.digest())?;
    let what = format!("blobs/sha256/{digest}");
    let json = archive.document(&what)?;
    let found = crate::hex(&Sha256::digest(&json));
    if found != digest {
        return Err(OciError::Digest {
            what,
            expected: digest.to_owned(),
            found,
        });
    }
    Ok((json, what))
}

/// The hexadecimal digits of a digest, which must be SHA-256.
fn sha256_of(digest: &Digest) -> Result<&str, OciError> {
    let digits = digest.digest();
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if *digest.algorithm() == DigestAlgorithm::Sha256
        && digits.len() == 64
        && digits.bytes().all(is_hex)
    {
        Ok(digits)
    } else {
        Err(OciError::Document {
            what: format!("the digest {digest}"),
            problem: "expected sha256: and 64 hexadecimal digits".to_owned(),
        })
    }
}

fn document(what: &str, error: &dyn std::error::Error) -> OciError {
    OciError::Document {
        what: what.to_owned(),
        problem: crate::chain(error),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::archive;
    use super::*;

    fn digest(bytes: &[u8]) -> String {
        crate::hex(&Sha256::digest(bytes))
    }

    /// The files of a layout.
    #[derive(Default)]
    struct Layout(Vec<(String, Vec<u8>)>);

    impl Layout {
        fn blob(&mut self, bytes: &[u8]) -> Value {
            let digest = digest(bytes);
            let path = format!("blobs/sha256/{digest}");
            self.0.push((path, bytes.to_owned()));
            json!({"digest": format!("sha256:{digest}"), "size": bytes.len()})
        }

        fn typed(&mut self, kind: &str, document: &Value) -> Value {
            let mut descriptor = self.blob(document.to_string().as_bytes());
            descriptor["mediaType"] = json!(kind);
            descriptor
        }

        /// A manifest of an image with one layer, whose architecture this is.
        fn image(&mut self, architecture: &str) -> Value {
            let layer = format!("layer for {architecture}");
            let mut descriptor = self.blob(layer.as_bytes());
            descriptor["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
            let config = json!({
                "architecture": architecture, "os": "linux",
                "config": {"Env": ["A=b"], "WorkingDir": "/srv", "User": "", "Cmd": ["sh"]},
                "rootfs": {"type": "layers",
                           "diff_ids": [format!("sha256:{}", digest(layer.as_bytes()))]},
            });
            let config = self.typed("application/vnd.oci.image.config.v1+json", &config);
            let manifest = json!({"schemaVersion": 2, "config": config, "layers": [descriptor]});
            self.typed("application/vnd.oci.image.manifest.v1+json", &manifest)
        }

        fn find(mut self, manifests: &[Value]) -> Result<Image, OciError> {
            let index = json!({"schemaVersion": 2, "manifests": manifests});
            self.0
                .push(("index.json".to_owned(), index.to_string().into_bytes()));
            let files: Vec<_> = self
                .0
                .iter()
                .map(|(path, content)| (path.as_str(), content.as_slice()))
                .collect();
            Image::find(&ImageArchive::open(archive(&files)).unwrap())
        }
    }

    #[test]
    fn an_image_is_found_through_indexes_for_this_kind_of_machine() {
        let mut layout = Layout::default();
        let mut others = Vec::new();
        for (architecture, os) in [("arm64", "linux"), ("unknown", "unknown")] {
            let mut other = layout.image(architecture);
            other["platform"] = json!({"architecture": architecture, "os": os});
            others.push(other);
        }
        let mut ours = layout.image("amd64");
        ours["platform"] = json!({"architecture": "amd64", "os": "linux"});
        others.push(ours);
        let list = json!({"schemaVersion": 2, "manifests": others});
        let mut list = layout.typed(INDEXES[1], &list);
        list["annotations"] = json!({NAMES[0]: "docker.io/library/x:1"});
        let image = layout.find(&[list.clone(), list]).unwrap();
        assert_eq!(image.name.as_deref(), Some("docker.io/library/x:1"));
        assert_eq!(image.env, ["A=b"]);
        assert_eq!(image.cwd.as_deref(), Some("/srv"));
        assert_eq!((image.user, image.entrypoint.len()), (None, 0));
        assert_eq!(image.cmd, ["sh"]);
        let layer = &image.layers[0];
        assert_eq!(layer.digest.as_ref(), Some(&layer.diff_id));
        let content = layer.content.clone().read_small(100).unwrap();
        assert_eq!(content, b"layer for amd64");
        assert!(image.id.starts_with("sha256:"));
    }

    #[test]
    fn other_machines_and_several_images_are_refused() {
        let mut layout = Layout::default();
        let arm = layout.image("arm64");
        let error = layout.find(&[arm]).unwrap_err();
        assert!(
            matches!(&error, OciError::Platform(other) if other == "linux/arm64"),
            "{error}"
        );
        let error = Layout::default().find(&[]).unwrap_err();
        assert!(matches!(error, OciError::Platform(_)), "{error}");
        let mut layout = Layout::default();
        let (one, two) = (layout.image("amd64"), layout.image("amd64 "));
        let error = layout.find(&[one, two]).unwrap_err();
        assert!(matches!(error, OciError::SeveralImages(2)), "{error}");
    }

    #[test]
    fn digests_and_sizes_are_checked() {
        let mut layout = Layout::default();
        let image = layout.image("amd64");
        for (_, content) in &mut layout.0 {
            if content.starts_with(b"{\"architecture") {
                // The configuration has other content than the manifest says.
                content.push(b' ');
            }
        }
        let error = layout.find(&[image]).unwrap_err();
        assert!(matches!(error, OciError::Digest { .. }), "{error}");

        let mut layout = Layout::default();
        let mut image = layout.image("amd64");
        image["digest"] = json!("sha256:../../../../etc/passwd");
        let error = layout.find(std::slice::from_ref(&image)).unwrap_err();
        assert!(matches!(error, OciError::Document { .. }), "{error}");
        image["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
        let error = Layout::default().find(&[image]).unwrap_err();
        assert!(matches!(error, OciError::Missing(_)), "{error}");

        let mut layout = Layout::default();
        let image = layout.image("amd64");
        layout
            .0
            .retain(|(_, content)| !content.starts_with(b"layer"));
        let error = layout.find(&[image]).unwrap_err();
        assert!(matches!(error, OciError::Missing(_)), "{error}");
    }

    #[test]
    fn an_index_that_refers_to_itself_or_to_too_much_ends() {
        let mut layout = Layout::default();
        let mut descriptor = layout.image("amd64");
        for _ in 0..MAX_INDEXES {
            let index = json!({"schemaVersion": 2, "manifests": [descriptor]});
            descriptor = layout.typed(INDEXES[0], &index);
        }
        let error = layout.find(&[descriptor]).unwrap_err();
        assert!(matches!(error, OciError::Document { .. }), "{error}");
        let mut layout = Layout::default();
        let image = layout.image("amd64");
        let error = layout.find(&vec![image; MAX_MANIFESTS + 1]).unwrap_err();
        assert!(matches!(error, OciError::Document { .. }), "{error}");
    }

    #[test]
    fn what_docker_saved_before_it_knew_layouts_is_read() {
        let layer = b"a layer";
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["/app"]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", digest(layer))]},
        })
        .to_string();
        let id = digest(config.as_bytes());
        let find = |name: &str, layers: &[&str]| {
            let manifest = json!([{"Config": name, "RepoTags": ["x:1"], "Layers": layers}]);
            let manifest = manifest.to_string();
            let files = [
                (name, config.as_bytes()),
                ("1/layer.tar", layer.as_slice()),
                ("manifest.json", manifest.as_bytes()),
            ];
            Image::find(&ImageArchive::open(archive(&files)).unwrap())
        };
        let image = find(&format!("{id}.json"), &["1/layer.tar"]).unwrap();
        assert_eq!(image.id, format!("sha256:{id}"));
        assert_eq!(
            (image.name.as_deref(), image.layers.len()),
            (Some("x:1"), 1)
        );
        assert_eq!(image.entrypoint, ["/app"]);
        let wrong = format!("{}.json", "0".repeat(64));
        assert!(matches!(
            find(&wrong, &["1/layer.tar"]),
            Err(OciError::Digest { .. })
        ));
        assert!(matches!(
            find("c.json", &["2/layer.tar"]),
            Err(OciError::Missing(_))
        ));
        assert!(matches!(
            find("c.json", &[]),
            Err(OciError::Document { .. })
        ));
        let many = vec!["1/layer.tar"; MAX_LAYERS + 1];
        assert!(matches!(
            find("c.json", &many),
            Err(OciError::TooManyLayers(_))
        ));
    }
}
