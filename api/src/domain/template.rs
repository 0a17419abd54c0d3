//! Templates: what sandboxes start from.
//!
//! ```text
//!             build                        all is there
//!   (none) ────────► building ───────────────────────────► ready ──── deleted ───► (none)
//!                       │  ▲                                            ▲
//!             an error, │  └ no way back: the next build is another     │
//!             crash     ▼                                               │
//!                    failed ──── deleted, or built anew under the name ─┘
//! ```
//!
//! A template that was built is frozen disk layers. It is found by its name, which it alone has. One
//! that is `ready` does not change any more: another content is another template. Beside these there
//! are the images that the host has, which are built outside of the daemon.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::id::{SandboxId, TemplateId, UserId};
use super::layer::Layers;

/// vCPUs of a sandbox whose template and creator say nothing.
pub const DEFAULT_VCPUS: u8 = 1;
/// RAM in MiB of a sandbox whose template and creator say nothing.
pub const DEFAULT_MEMORY_MB: u32 = 512;

/// A template that was built, or is being built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its id.
    pub id: TemplateId,
    /// Whose it is; `None` is the local principal, whose templates are everybody's to use.
    pub owner: Option<UserId>,
    /// Its name, which no other has.
    pub name: String,
    /// What it is made from.
    pub source: Source,
    /// Where it stands.
    pub status: TemplateStatus,
    /// What sandboxes of it have.
    pub settings: Settings,
    /// Its disk: layers that it holds from the moment that it is being built. No memory.
    pub layers: Layers,
    /// What there is to say of its disk; `None` unless it is ready.
    pub content: Option<TemplateContent>,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// What a template is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    /// An image on the host.
    Image,
    /// The disk of a sandbox.
    Sandbox {
        /// Which one.
        sandbox: SandboxId,
        /// The template of that.
        base: String,
    },
    /// A recipe.
    Recipe {
        /// The template that its steps were run in.
        base: String,
    },
    /// An OCI image.
    Oci {
        /// The digest of the image's configuration, as in `sha256:…`.
        image: String,
        /// The name that the archive gives it.
        reference: Option<String>,
    },
}

/// Where a template stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum TemplateStatus {
    /// It is being built.
    Building,
    /// Sandboxes can be made from it.
    Ready,
    /// It was not built.
    Failed {
        /// Why, as a sentence.
        reason: String,
    },
}

impl TemplateStatus {
    /// The word for it in the APIs.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Failed { .. } => "failed",
        }
    }
}

/// What sandboxes of a template have, if nobody says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// Virtual CPUs.
    pub vcpus: Option<u8>,
    /// RAM in MiB.
    pub memory_mb: Option<u32>,
    /// What must succeed in a sandbox before it counts as running.
    pub readiness: Option<Readiness>,
    /// Environment of its commands, beside what every command has.
    pub env: BTreeMap<String, String>,
    /// Working directory of its commands; the user's home if `None`.
    pub cwd: Option<String>,
    /// User that the image wants its program to be run as. Kept, and not acted on.
    pub user: Option<String>,
    /// What the image runs. Kept, and not acted on.
    pub entrypoint: Vec<String>,
    /// The arguments of that. Kept, and not acted on.
    pub cmd: Vec<String>,
}

/// A command that tells whether a sandbox can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Seconds in which it must have succeeded.
    pub timeout_sec: u32,
}

/// What there is to say of a template's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateContent {
    /// SHA-256, as hexadecimal digits. Of an image on the host, that of the file; otherwise of the
    /// digests of what its disk is made of, bottom first.
    pub digest: Option<String>,
    /// Space that it takes on the host's disk, in bytes; without that of its base.
    pub size_bytes: u64,
    /// Size that the disk has in a sandbox, in bytes.
    pub disk_bytes: u64,
}

/// A template as the APIs tell of it: one that was built, or an image on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Its name.
    pub name: String,
    /// What it is made from.
    pub source: Source,
    /// Where it stands.
    pub status: TemplateStatus,
    /// What sandboxes of it have.
    pub settings: Settings,
    /// What there is to say of its disk.
    pub content: Option<TemplateContent>,
    /// When it was asked for; of an image, when it was made.
    pub created_at: Timestamp,
}

impl From<Template> for TemplateInfo {
    fn from(template: Template) -> Self {
        Self {
            name: template.name,
            source: template.source,
            status: template.status,
            settings: template.settings,
            content: template.content,
            created_at: template.created_at,
        }
    }
}
