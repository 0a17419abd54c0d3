//! The description in `docs/vmm-api.yaml` says what the code does.
//!
//! The file is read by its indentation alone, which is enough for the questions asked here.

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;

use super::body;
use super::routes::{Handler, ROUTES};
use crate::config::{
    BackingImage, BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig,
    PayloadConfig, RngConfig, SerialConfig, VmConfig, VsockConfig,
};
use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

const DOCUMENT: &str = include_str!("../../../docs/vmm-api.yaml");

/// The lines below `key`, which stands alone on a line at that indentation.
fn below<'a>(text: &'a str, indentation: usize, key: &str) -> &'a str {
    let head = format!("{}{key}:\n", " ".repeat(indentation));
    let start = if text.starts_with(&head) {
        head.len()
    } else {
        let found = text.find(&format!("\n{head}"));
        found.unwrap_or_else(|| panic!("no {key}")) + 1 + head.len()
    };
    let rest = &text[start..];
    let deeper = |line: &&str| line.len() - line.trim_start().len() > indentation;
    let len = rest.split_inclusive('\n').take_while(deeper).map(str::len);
    &rest[..len.sum()]
}

/// The keys at that indentation.
fn keys(text: &str, indentation: usize) -> BTreeSet<String> {
    let lines = text.lines().filter_map(|line| {
        let key = line.strip_prefix(&" ".repeat(indentation))?;
        let key = key.strip_suffix(':')?;
        (!key.starts_with(' ')).then(|| key.to_owned())
    });
    lines.collect()
}

#[test]
fn every_endpoint_is_described_and_no_other() {
    let paths = below(DOCUMENT, 0, "paths");
    let described = keys(paths, 2);
    let served: BTreeSet<String> = ROUTES
        .iter()
        .map(|route| format!("/{}", route.name))
        .collect();
    assert_eq!(described, served);
    for route in &ROUTES {
        let path = below(paths, 2, &format!("/{}", route.name));
        let method = route.method.as_str().to_lowercase();
        assert_eq!(keys(path, 4), BTreeSet::from([method]), "{}", route.name);
        let takes_body = path.contains("requestBody:");
        assert_eq!(takes_body, route.handler.takes_body(), "{}", route.name);
        let refused = !path.contains("'200'") && !path.contains("'204'");
        assert_eq!(
            refused,
            matches!(route.handler, Handler::Lacking(_)),
            "{}",
            route.name
        );
    }
}

/// The fields that a message about an unknown field names.
fn fields_of(message: &str) -> BTreeSet<String> {
    let (_, expected) = message
        .split_once("expected")
        .unwrap_or_else(|| panic!("{message}"));
    expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

fn known_to<T: DeserializeOwned>() -> BTreeSet<String> {
    match serde_json::from_str::<T>("{\"?\": 0}") {
        Err(error) => fields_of(&error.to_string()),
        Ok(_) => panic!("an unknown field is taken"),
    }
}

#[test]
fn every_field_is_described_and_no_other() {
    let taken_by = |parse: fn(&[u8]) -> Result<_, body::BodyError>| {
        let error = parse(b"{\"?\": 0}").unwrap_err();
        fields_of(&crate::error_chain(&error))
    };
    let schemas = below(below(DOCUMENT, 0, "components"), 2, "schemas");
    for (schema, known) in [
        ("VmConfig", known_to::<VmConfig>()),
        ("CpusConfig", known_to::<CpusConfig>()),
        ("MemoryConfig", known_to::<MemoryConfig>()),
        ("PayloadConfig", known_to::<PayloadConfig>()),
        ("DiskConfig", known_to::<DiskConfig>()),
        ("NetConfig", known_to::<NetConfig>()),
        ("RateLimiterConfig", known_to::<RateLimiterConfig>()),
        ("TokenBucketConfig", known_to::<TokenBucketConfig>()),
        ("VsockConfig", known_to::<VsockConfig>()),
        ("RngConfig", known_to::<RngConfig>()),
        ("BalloonConfig", known_to::<BalloonConfig>()),
        ("SerialConfig", known_to::<SerialConfig>()),
        ("ConsoleConfig", known_to::<ConsoleConfig>()),
        ("VmResize", taken_by(body::resize)),
        ("VmResizeDisk", taken_by(body::resize_disk)),
        ("VmRemoveDevice", taken_by(body::remove_device)),
        ("VmCoredumpData", taken_by(body::core_dump)),
        ("BackingImage", known_to::<BackingImage>()),
        (
            "VmSnapshotConfig",
            taken_by(|body| body::snapshot(body, Vec::new())),
        ),
        (
            "RestoreConfig",
            taken_by(|body| body::restore(body, Vec::new())),
        ),
        (
            "VmReplaceDisk",
            taken_by(|body| body::replace_disk(body, Vec::new())),
        ),
        (
            "VmWorkingSet",
            taken_by(|body| body::working_set(body, Vec::new())),
        ),
    ] {
        let properties = below(below(schemas, 4, schema), 6, "properties");
        assert_eq!(keys(properties, 8), known, "{schema}");
    }
}
