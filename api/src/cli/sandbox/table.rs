//! Sandboxes and snapshots for people.

use serde_json::Value;

use crate::cli::table::{bytes, columns, mib, text};

/// A table of sandboxes.
pub fn sandboxes(sandboxes: &Value) -> String {
    let head = [
        "ID", "STATUS", "TEMPLATE", "VCPUS", "MEMORY", "ADDRESS", "CREATED", "REASON",
    ];
    let rows = sandboxes.as_array().into_iter().flatten();
    columns(
        head,
        rows.map(|sandbox| {
            [
                text(&sandbox["id"]),
                text(&sandbox["status"]),
                text(&sandbox["template"]),
                text(&sandbox["vcpus"]),
                mib(&sandbox["memory_mb"]),
                text(&sandbox["guest_ip"]),
                text(&sandbox["created_at"]),
                text(&sandbox["status_reason"]),
            ]
        }),
    )
}

/// A table of snapshots.
pub fn snapshots(snapshots: &Value) -> String {
    let head = [
        "ID", "NAME", "SANDBOX", "TEMPLATE", "VCPUS", "MEMORY", "SIZE", "HOLDS", "CREATED",
    ];
    let rows = snapshots.as_array().into_iter().flatten();
    columns(
        head,
        rows.map(|snapshot| {
            let holds = match snapshot["include_memory"].as_bool() {
                Some(false) => "disk",
                _ => "memory, disk",
            };
            [
                text(&snapshot["id"]),
                text(&snapshot["name"]),
                text(&snapshot["sandbox_id"]),
                text(&snapshot["template"]),
                text(&snapshot["vcpus"]),
                mib(&snapshot["memory_mb"]),
                bytes(&snapshot["size_bytes"]),
                holds.to_owned(),
                text(&snapshot["created_at"]),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tables_line_up_and_show_no_control_characters() {
        let table = sandboxes(&json!([
            {"id": "sb-1", "status": "running", "template": "minimal", "vcpus": 1,
             "memory_mb": 512, "guest_ip": "192.168.200.2", "created_at": "2026-01-01T00:00:00Z"},
            {"id": "sb-2", "status": "error", "template": "x", "vcpus": 16, "memory_mb": 4096,
             "created_at": "2026-01-01T00:00:00Z", "status_reason": "it\nended \u{1b}[1m"},
        ]));
        assert_eq!(
            table,
            "ID    STATUS   TEMPLATE  VCPUS  MEMORY    ADDRESS        CREATED               REASON\n\
             sb-1  running  minimal   1      512 MiB   192.168.200.2  2026-01-01T00:00:00Z\n\
             sb-2  error    x         16     4096 MiB                 2026-01-01T00:00:00Z  itended [1m\n"
        );
        let table = snapshots(
            &json!([{"id": "sn-1", "sandbox_id": "sb-1", "template": "minimal",
            "vcpus": 1, "memory_mb": 512, "size_bytes": 5 << 20, "include_memory": false,
            "created_at": "2026-01-01T00:00:00Z"}]),
        );
        assert!(
            table.ends_with("512 MiB  5 MiB  disk   2026-01-01T00:00:00Z\n"),
            "{table}"
        );
    }
}
