//! The kernel's command line (Documentation/admin-guide/kernel-parameters in Linux).

use std::path::PathBuf;

/// What of the command line concerns the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootOptions {
    /// `root=`: the root device. Without it the agent stays in the initramfs.
    pub root: Option<PathBuf>,
    /// `rootfstype=`: file systems to try, in turn.
    pub filesystems: Vec<String>,
    /// `rootflags=`: options of the file system.
    pub flags: String,
    /// `ro`, unless a later `rw` follows.
    pub read_only: bool,
    /// `agent.hostname=`
    pub hostname: Option<String>,
}

impl BootOptions {
    /// Reads a command line. What is unknown belongs to others and is passed over.
    pub fn parse(line: &str) -> Self {
        let mut options = Self {
            root: None,
            filesystems: vec!["ext4".to_owned()],
            flags: String::new(),
            read_only: false,
            hostname: None,
        };
        for word in words(line) {
            let (name, value) = word.split_once('=').unwrap_or((&word, ""));
            match name {
                "root" if !value.is_empty() => options.root = Some(value.into()),
                "rootfstype" if !value.is_empty() => {
                    options.filesystems = value.split(',').map(str::to_owned).collect();
                }
                "rootflags" => options.flags = value.to_owned(),
                "ro" => options.read_only = true,
                "rw" => options.read_only = false,
                "agent.hostname" if !value.is_empty() => {
                    options.hostname = Some(value.to_owned());
                }
                _ => {}
            }
        }
        options
    }
}

/// Splits at white space outside of double quotes, and takes the quotes away.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            c if c.is_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_word_counts() {
        let options = BootOptions::parse(
            "console=ttyS0 quiet root=/dev/vda ro rootfstype=ext4,xfs rw \
             rootflags=\"noatime, discard\" agent.hostname=box --\n",
        );
        assert_eq!(
            options,
            BootOptions {
                root: Some("/dev/vda".into()),
                filesystems: vec!["ext4".into(), "xfs".into()],
                flags: "noatime, discard".into(),
                read_only: false,
                hostname: Some("box".into()),
            }
        );
    }

    #[test]
    fn an_empty_line_has_no_root() {
        let options = BootOptions::parse("root= rootfstype= ro");
        assert_eq!(options.root, None);
        assert_eq!(options.filesystems, ["ext4"]);
        assert!(options.read_only);
    }

    proptest! {
        #[test]
        fn any_line_is_read(line: String) {
            let _ = BootOptions::parse(&line);
        }
    }
}
