//! Tables for people, and templates in them.

use serde_json::Value;

/// A table of templates.
pub fn list(templates: &Value) -> String {
    let head = [
        "NAME", "STATUS", "SOURCE", "VCPUS", "MEMORY", "DISK", "SIZE", "CREATED", "DIGEST",
    ];
    let rows = templates.as_array().into_iter().flatten();
    columns(
        head,
        rows.map(|template| {
            let digest = text(&template["digest"]);
            [
                text(&template["name"]),
                text(&template["status"]),
                source(&template["source"]),
                text(&template["vcpus"]),
                mib(&template["memory_mb"]),
                mib(&template["disk_mb"]),
                bytes(&template["size_bytes"]),
                text(&template["created_at"]),
                digest.chars().take(12).collect(),
            ]
        }),
    )
}

/// Columns below their heads.
pub fn columns<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned))
        .chain(rows)
        .collect();
    let widths: Vec<_> = (0..N)
        .map(|column| {
            let widths = rows.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or_default()
        })
        .collect();
    let mut table = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        table.push_str(line.join("  ").trim_end());
        table.push('\n');
    }
    table
}

/// One template: a line for each thing that is known of it.
pub fn one(template: &Value) -> String {
    let mut lines = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            lines.push_str(&format!("{name:<11} {value}\n"));
        }
    };
    line("name", text(&template["name"]));
    line("status", text(&template["status"]));
    line("reason", text(&template["status_reason"]));
    line("digest", text(&template["digest"]));
    line("source", source(&template["source"]));
    line("vcpus", text(&template["vcpus"]));
    line("memory", mib(&template["memory_mb"]));
    line("disk", mib(&template["disk_mb"]));
    line("size", bytes(&template["size_bytes"]));
    line("created", text(&template["created_at"]));
    let readiness = &template["readiness"];
    if readiness.is_object() {
        let timeout = text(&readiness["timeout_sec"]);
        line(
            "readiness",
            format!("{} (within {timeout} s)", words(&readiness["cmd"])),
        );
    }
    for (name, value) in template["env"].as_object().into_iter().flatten() {
        line("env", format!("{name}={}", text(value)));
    }
    line("cwd", text(&template["cwd"]));
    for (name, field) in [
        ("user", "user"),
        ("entrypoint", "entrypoint"),
        ("cmd", "cmd"),
    ] {
        let value = match &template[field] {
            Value::Array(_) => words(&template[field]),
            other => text(other),
        };
        if !value.is_empty() {
            line(name, format!("{value} (the image's; not acted on)"));
        }
    }
    lines
}

/// Text without control characters: some of it comes from strangers.
pub fn text(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.chars().filter(|c| !c.is_control()).collect()
}

fn words(value: &Value) -> String {
    let words = value.as_array().into_iter().flatten().map(text);
    words.collect::<Vec<_>>().join(" ")
}

fn source(source: &Value) -> String {
    match text(&source["kind"]).as_str() {
        "sandbox" => format!("sandbox {}", text(&source["sandbox_id"])),
        "recipe" => format!("recipe on {}", text(&source["base"])),
        "oci" if source["reference"].is_string() => format!("oci {}", text(&source["reference"])),
        kind => kind.to_owned(),
    }
}

/// A size in MiB.
pub fn mib(value: &Value) -> String {
    value
        .as_u64()
        .map(|mib| format!("{mib} MiB"))
        .unwrap_or_default()
}

/// A size in bytes, in a unit that suits it.
pub fn bytes(value: &Value) -> String {
    let Some(bytes) = value.as_u64() else {
        return String::new();
    };
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes / 1024),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up_and_show_no_control_characters() {
        let templates = json!([
            {"name": "minimal", "status": "ready", "source": {"kind": "image"}, "vcpus": 1,
             "memory_mb": 512, "disk_mb": 2048, "size_bytes": 5 << 20,
             "created_at": "2026-01-01T00:00:00Z", "digest": "0123456789abcdef"},
            {"name": "x", "status": "building", "vcpus": 2, "memory_mb": 1024,
             "source": {"kind": "oci", "reference": "a\u{1b}[31m:1"},
             "created_at": "2026-01-01T00:00:00Z"},
        ]);
        assert_eq!(
            list(&templates),
            "NAME     STATUS    SOURCE       VCPUS  MEMORY    DISK      SIZE   CREATED               DIGEST\n\
             minimal  ready     image        1      512 MiB   2048 MiB  5 MiB  2026-01-01T00:00:00Z  0123456789ab\n\
             x        building  oci a[31m:1  2      1024 MiB                   2026-01-01T00:00:00Z\n"
        );
        let shown = one(&json!({
            "name": "x", "status": "failed", "status_reason": "why", "size_bytes": 2000,
            "readiness": {"cmd": ["curl", "x"], "timeout_sec": 3}, "env": {"A": "b"},
            "entrypoint": ["/app"], "source": {"kind": "sandbox", "sandbox_id": "sb-1"},
        }));
        assert_eq!(
            shown,
            "name        x\nstatus      failed\nreason      why\nsource      sandbox sb-1\n\
             size        1 KiB\nreadiness   curl x (within 3 s)\nenv         A=b\n\
             entrypoint  /app (the image's; not acted on)\n"
        );
    }
}
