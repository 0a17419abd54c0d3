//! Uploads: forms with a file, the same for all dialects but for the names of their fields.
//!
//! A file that comes last, after what must be known of it, is passed on as it arrives, and no faster than
//! the guest takes it; otherwise it waits on the daemon's disk for the other fields.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Bytes;
use axum::extract::Request;
use axum::extract::multipart::MultipartError;
use futures_util::stream::{self, BoxStream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::forms::{
    FORM_OVERHEAD, Form, FormField, PIECES_IN_FLIGHT, SPOOL_MEMORY, announced, content,
    ends_with_none, form,
};
use crate::chain;
use crate::domain::{FileError, InUse, Manager, Spooled, check_path};

/// The longest text field that is read, in bytes: a path, as the domain allows it.
const MAX_TEXT: usize = 4095;
/// The field of the file.
const FILE: &str = "file";
/// The field of its permission bits, where a form has one.
const PERMISSIONS: &str = "permissions";

/// What a form has besides the file.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The field of the path.
    pub path: &'static str,
    /// Permission bits of a file for which none are given, in a form with such a field; `None`: it has no
    /// such field.
    pub mode: Option<u32>,
    /// Whether the digest is wanted.
    pub with_digest: bool,
    /// The largest file, in bytes.
    pub limit: u64,
}

/// A file that was uploaded.
#[derive(Debug)]
pub struct Uploaded {
    /// Where it is.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// SHA-256, as hexadecimal digits, if it was wanted.
    pub digest: Option<String>,
}

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// It is larger than this many bytes.
    #[error("the file exceeds the limit of {0} bytes")]
    TooLarge(u64),
    /// The request is no form, or cannot be read.
    #[error("{0}")]
    Form(String),
    /// A field is missing or makes no sense.
    #[error("{field} {problem}")]
    Field {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// It could not be written in the guest.
    #[error("the file could not be written")]
    File(#[source] FileError),
    /// Too much of its user waits on the daemon's disk already.
    #[error("{0}")]
    TooManyWait(String),
    /// It could not wait on the daemon's disk.
    #[error("the file cannot be spooled to disk")]
    Spool(#[source] io::Error),
}

/// Takes a form, and writes its file in a sandbox.
///
/// # Errors
/// The file is as it was before.
pub async fn take(
    manager: &Manager,
    in_use: &InUse,
    request: Request,
    rules: Rules,
) -> Result<Uploaded, UploadError> {
    let most = rules.limit.saturating_add(FORM_OVERHEAD);
    if announced(&request).is_some_and(|length| length > most) {
        return Err(UploadError::TooLarge(rules.limit));
    }
    let form = form(request).await.map_err(|rejection| {
        UploadError::Form(format!("expected multipart/form-data: {rejection}"))
    })?;
    let upload = Upload {
        manager,
        in_use,
        rules,
        digest: rules.with_digest.then(Arc::default),
    };
    let (path, size) = upload.run(form).await?;
    let digest = upload.digest.map(|digest| {
        let digest = digest.lock().unwrap_or_else(PoisonError::into_inner);
        crate::hex(&digest.clone().finalize())
    });
    Ok(Uploaded { path, size, digest })
}

/// An upload on its way into a sandbox.
struct Upload<'a> {
    manager: &'a Manager,
    in_use: &'a InUse,
    rules: Rules,
    digest: Option<Arc<Mutex<Sha256>>>,
}

/// What became of a file when it was come to.
enum Come {
    /// It is there, at this path, and has this size.
    There(String, u64),
    /// It waits for other fields.
    Waits(Spooled),
}

impl Upload<'_> {
    /// Where the file is, and its size.
    async fn run(&self, mut form: Form) -> Result<(String, u64), UploadError> {
        let (mut path, mut mode, mut waiting) = (None, None, None);
        let field_path = self.rules.path;
        while let Some(mut field) = form.next_field().await.map_err(|error| bad_form(&error))? {
            match field.name() {
                Some(name) if name == field_path => {
                    let text = read_text(&mut field, field_path).await?;
                    check_path(&text).map_err(|problem| wrong_path(field_path, &problem))?;
                    only_one(&mut path, text, field_path)?;
                }
                Some(PERMISSIONS) if self.rules.mode.is_some() => {
                    let text = read_text(&mut field, PERMISSIONS).await?;
                    only_one(&mut mode, permissions(&text)?, PERMISSIONS)?;
                }
                Some(FILE) if waiting.is_none() => {
                    match self.come_to(&mut field, path.as_ref(), mode).await? {
                        Come::There(path, size) => return Ok((path, size)),
                        Come::Waits(file) => waiting = Some(file),
                    }
                }
                _ => field.skip().await.map_err(|error| bad_form(&error))?,
            }
        }
        let path = path.ok_or_else(|| missing(field_path))?;
        let file = waiting.ok_or_else(|| missing(FILE))?;
        let size = file.len();
        let mode = mode.or(self.rules.mode);
        self.write(path.clone(), mode, content(file)).await?;
        Ok((path, size))
    }

    /// Writes the file, if all is known of it, or lets it wait.
    async fn come_to(
        &self,
        field: &mut FormField<'_>,
        path: Option<&String>,
        mode: Option<u32>,
    ) -> Result<Come, UploadError> {
        match path {
            Some(path) if self.rules.mode.is_none() || mode.is_some() => {
                let size = self.pass_on(path.clone(), mode, field).await?;
                Ok(Come::There(path.clone(), size))
            }
            _ => Ok(Come::Waits(self.spool(field).await?)),
        }
    }

    async fn write(
        &self,
        path: String,
        mode: Option<u32>,
        content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), UploadError> {
        let digest = self.digest.clone();
        let content = content.inspect(move |piece| {
            if let (Some(digest), Ok(piece)) = (&digest, piece) {
                let mut digest = digest.lock().unwrap_or_else(PoisonError::into_inner);
                digest.update(piece);
            }
        });
        let (manager, in_use) = (self.manager, self.in_use);
        let written = manager.write_file(in_use, path, mode, content.boxed());
        written.await.map_err(UploadError::File)
    }

    /// Passes the file on as it comes. Returns its size.
    async fn pass_on(
        &self,
        path: String,
        mode: Option<u32>,
        field: &mut FormField<'_>,
    ) -> Result<u64, UploadError> {
        let (sender, mut pieces) = mpsc::channel(PIECES_IN_FLIGHT);
        let content = stream::poll_fn(move |context| pieces.poll_recv(context));
        let content = ends_with_none(content.boxed());
        let pump = async move {
            let mut total = 0;
            loop {
                let piece = field.chunk().await.map_err(|error| bad_form(&error))?;
                let is_last = piece.is_none();
                total += piece.as_ref().map_or(0, |bytes| bytes.len() as u64);
                if total > self.rules.limit {
                    return Err(UploadError::TooLarge(self.rules.limit));
                }
                // Nobody takes pieces any more once the write has failed.
                if sender.send(piece).await.is_err() || is_last {
                    return Ok(total);
                }
            }
        };
        let (pumped, written) = tokio::join!(pump, self.write(path, mode, content));
        let size = pumped?;
        written?;
        Ok(size)
    }

    async fn spool(&self, field: &mut FormField<'_>) -> Result<Spooled, UploadError> {
        let mut spool = self.manager.spool(SPOOL_MEMORY);
        while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
            if spool.len() + piece.len() as u64 > self.rules.limit {
                return Err(UploadError::TooLarge(self.rules.limit));
            }
            spool.push(&piece).await.map_err(not_spooled)?;
        }
        spool.finish().await.map_err(UploadError::Spool)
    }
}

fn not_spooled(error: io::Error) -> UploadError {
    match error.kind() {
        io::ErrorKind::QuotaExceeded => UploadError::TooManyWait(error.to_string()),
        _ => UploadError::Spool(error),
    }
}

fn missing(field: &'static str) -> UploadError {
    let problem = "is required".to_owned();
    UploadError::Field { field, problem }
}

/// The path makes no sense, by a sentence about `path`.
fn wrong_path(field: &'static str, problem: &str) -> UploadError {
    let problem = problem.trim_start_matches("path ").to_owned();
    UploadError::Field { field, problem }
}

fn only_one<T>(known: &mut Option<T>, new: T, field: &'static str) -> Result<(), UploadError> {
    match known.replace(new) {
        None => Ok(()),
        Some(_) => Err(UploadError::Form(format!(
            "the form has more than one {field}"
        ))),
    }
}

/// A form that cannot be read.
pub fn bad_form(error: &MultipartError) -> UploadError {
    UploadError::Form(format!("the form cannot be read: {}", chain(error)))
}

async fn read_text(field: &mut FormField<'_>, name: &'static str) -> Result<String, UploadError> {
    let wrong = |problem: String| UploadError::Field {
        field: name,
        problem,
    };
    let mut text = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
        if text.len() + piece.len() > MAX_TEXT {
            return Err(wrong(format!("is longer than {MAX_TEXT} bytes")));
        }
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).map_err(|_| wrong("is not UTF-8".to_owned()))
}

fn permissions(text: &str) -> Result<u32, UploadError> {
    let is_octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| is_octal);
    mode.ok_or_else(|| UploadError::Field {
        field: PERMISSIONS,
        problem: "must be 3 or 4 octal digits, as 644".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_octal_digits() {
        assert_eq!(permissions("644").unwrap(), 0o644);
        assert_eq!(permissions("4755").unwrap(), 0o4755);
        for bad in ["", "64", "888", "+64", "0o644", "77777"] {
            assert!(permissions(bad).is_err(), "{bad}");
        }
    }
}
