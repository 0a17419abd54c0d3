//! Recipes: TOML files, and the files that they name.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::archive::{self, ArchiveFile};

/// A recipe as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recipe {
    base: Option<String>,
    vcpus: Option<i64>,
    memory_mb: Option<i64>,
    readiness: Option<Readiness>,
    env: Option<BTreeMap<String, String>>,
    cwd: Option<String>,
    #[serde(default)]
    files: Vec<RecipeFile>,
    #[serde(default)]
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Readiness {
    cmd: Vec<String>,
    timeout_sec: Option<i64>,
}

/// A file, or a directory with all that is in it, that the template gets.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeFile {
    /// Where it is, relative to the recipe.
    pub from: PathBuf,
    /// Where it comes to be, absolute.
    pub to: String,
    /// Its permission bits, in octal; those that it has here if not given.
    pub mode: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    run: String,
    timeout_sec: Option<i64>,
}

/// A recipe as the daemon takes it.
#[derive(Debug)]
pub struct Prepared {
    /// Fields of the request.
    pub fields: Map<String, Value>,
    /// The files, if there are any.
    pub files: Option<ArchiveFile>,
}

/// Why there is nothing to send.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A file cannot be read.
    #[error("{path} cannot be read", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The recipe makes no sense.
    #[error("the recipe {path} makes no sense", path = path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong with it, and where.
        #[source]
        source: toml::de::Error,
    },
    /// A file of the recipe is not one that can be added.
    #[error("{path} {problem}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The archive to send cannot be written.
    #[error("the archive to send cannot be made")]
    Archive(#[source] io::Error),
    /// The task that read it is gone.
    #[error("the reading was interrupted")]
    Interrupted,
}

/// Reads a recipe and packs its files. This blocks.
pub fn read(path: &Path) -> Result<Prepared, RecipeError> {
    let text = std::fs::read_to_string(path).map_err(|source| RecipeError::Read {
        path: path.to_owned(),
        source,
    })?;
    let recipe: Recipe = toml::from_str(&text).map_err(|source| RecipeError::Parse {
        path: path.to_owned(),
        source,
    })?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let files = match recipe.files.as_slice() {
        [] => None,
        files => Some(archive::files(dir, files)?),
    };
    let mut fields = Map::new();
    let timed = |mut value: Value, timeout_sec: Option<i64>| {
        if let Some(seconds) = timeout_sec {
            value["timeout_sec"] = seconds.into();
        }
        value
    };
    let steps = recipe
        .steps
        .into_iter()
        .map(|step| timed(json!({"run": step.run}), step.timeout_sec));
    let mut body = json!({"steps": steps.collect::<Vec<_>>()});
    if let Some(base) = recipe.base {
        body["base"] = base.into();
    }
    fields.insert("recipe".to_owned(), body);
    for (name, value) in [
        ("vcpus", recipe.vcpus.map(Value::from)),
        ("memory_mb", recipe.memory_mb.map(Value::from)),
        (
            "readiness",
            recipe
                .readiness
                .map(|readiness| timed(json!({"cmd": readiness.cmd}), readiness.timeout_sec)),
        ),
        ("env", recipe.env.map(|env| json!(env))),
        ("cwd", recipe.cwd.map(Value::from)),
    ] {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    }
    Ok(Prepared { fields, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_becomes_a_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        std::fs::write(
            &path,
            "base = 'b'\nvcpus = 2\nreadiness = { cmd = ['x'] }\nenv = { A = 'b' }\n\
             [[steps]]\nrun = 'one'\n[[steps]]\nrun = 'two'\ntimeout_sec = 5\n",
        )
        .unwrap();
        let prepared = read(&path).unwrap();
        assert_eq!(
            Value::from(prepared.fields),
            json!({"recipe": {"base": "b", "steps": [{"run": "one"},
                                                     {"run": "two", "timeout_sec": 5}]},
                   "vcpus": 2, "readiness": {"cmd": ["x"]}, "env": {"A": "b"}})
        );
        assert!(prepared.files.is_none());
        std::fs::write(&path, "bse = 'b'").unwrap();
        assert!(matches!(read(&path), Err(RecipeError::Parse { .. })));
        std::fs::write(&path, "[[files]]\nfrom = 'none'\nto = '/x'").unwrap();
        assert!(matches!(read(&path), Err(RecipeError::Read { .. })));
        let error = read(&dir.path().join("none")).unwrap_err();
        assert!(matches!(error, RecipeError::Read { .. }));
    }
}
