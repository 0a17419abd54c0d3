//! A request for each operation that the API describes.

#![allow(clippy::panic, reason = "a test that cannot go on may panic")]

/// Ids of one user's things, or of nobody's.
pub struct Things {
    pub sandbox: String,
    pub snapshot: String,
    pub template: String,
    pub key: String,
    pub scan: String,
}

impl Things {
    /// The path with these in place of its parameters.
    pub fn fill(&self, path: &str) -> String {
        let segments: Vec<_> = path.split('/').collect();
        let filled = segments.iter().enumerate().map(|(at, segment)| {
            let of = segments[at.saturating_sub(1)];
            match (*segment, of) {
                ("{id}", "sandboxes" | "capsules") | ("{vm_name}", "vms") => &self.sandbox,
                ("{id}", "snapshots") | ("{snapshot_name}", "snapshots") => &self.snapshot,
                ("{name}", "templates") => &self.template,
                ("{id}", "api-keys") => &self.key,
                ("{scan_id}", _) => &self.scan,
                ("{transport}", _) => "tcp",
                ("{host_port}", _) => "10000",
                ("{host}", _) => "127.0.0.1:10000",
                ("{process}", _) => "1",
                ("{path}", _) => "x",
                ("{port}", _) => "80",
                (parameter, _) if parameter.starts_with('{') => {
                    panic!("say here what {parameter} of {path} is")
                }
                (literal, _) => literal,
            }
        });
        filled.collect::<Vec<_>>().join("/")
    }
}

/// A body that makes sense at this path, where one is looked at before it is looked whose the thing
/// is.
pub fn body_for(path: &str) -> &'static str {
    match path.rsplit('/').next() {
        Some("exec") => r#"{"cmd": "true"}"#,
        Some("read" | "list" | "mkdir" | "remove") => r#"{"path": "/f"}"#,
        Some("egress") => r#"{"policy": "none"}"#,
        Some("forwards") => r#"{"guest_port": 80}"#,
        Some("fork") => r#"{"count": 1}"#,
        Some("resources") => r#"{"vcpus": 1}"#,
        Some("download") => r#"{"remote_path": "/f"}"#,
        Some("execute" | "command") => r#"{"command": "true"}"#,
        Some("port-forward") => r#"{"host_port": 10000, "guest_port": 80, "protocol": "tcp"}"#,
        _ => "{}",
    }
}
