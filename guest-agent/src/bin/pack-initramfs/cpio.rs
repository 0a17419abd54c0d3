//! The newc format of cpio archives, as the kernel unpacks it
//! (Documentation/driver-api/early-userspace/buffer-format.rst in Linux).

use std::io::{self, Write};

const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_CHAR_DEVICE: u32 = 0o020_000;
const MODE_FILE: u32 = 0o100_000;

/// An archive being written. All files belong to root and have no time, so that equal contents
/// give equal archives.
pub struct Archive<W> {
    output: W,
    next_inode: u32,
}

#[derive(Default)]
struct Header<'a> {
    name: &'a str,
    mode: u32,
    links: u32,
    device: (u32, u32),
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(output: W) -> Self {
        Self {
            output,
            next_inode: 1,
        }
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str, permissions: u32) -> io::Result<()> {
        let header = Header {
            name,
            mode: MODE_DIRECTORY | permissions,
            links: 2,
            device: (0, 0),
        };
        self.entry(&header, &[])
    }

    /// Adds a character device of these major and minor numbers.
    pub fn char_device(
        &mut self,
        name: &str,
        permissions: u32,
        device: (u32, u32),
    ) -> io::Result<()> {
        let header = Header {
            name,
            mode: MODE_CHAR_DEVICE | permissions,
            links: 1,
            device,
        };
        self.entry(&header, &[])
    }

    /// Adds a regular file.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        let header = Header {
            name,
            mode: MODE_FILE | permissions,
            links: 1,
            device: (0, 0),
        };
        self.entry(&header, content)
    }

    /// Writes the entry that ends an archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        let header = Header {
            name: "TRAILER!!!",
            links: 1,
            ..Header::default()
        };
        self.entry(&header, &[])?;
        Ok(self.output)
    }

    fn entry(&mut self, header: &Header<'_>, content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(content.len()).map_err(too_large)?;
        // The name is followed by a NUL, which counts.
        let name_size = u32::try_from(header.name.len() + 1).map_err(too_large)?;
        let fields = [
            self.next_inode,
            header.mode,
            0, // user
            0, // group
            header.links,
            0, // time
            size,
            0, // major number of the file system
            0, // minor number of the file system
            header.device.0,
            header.device.1,
            name_size,
            0, // checksum, unused
        ];
        self.next_inode += 1;
        self.output.write_all(b"070701")?;
        for field in fields {
            write!(self.output, "{field:08X}")?;
        }
        self.output.write_all(header.name.as_bytes())?;
        self.output.write_all(b"\0")?;
        self.pad(6 + 8 * fields.len() + header.name.len() + 1)?;
        self.output.write_all(content)?;
        self.pad(content.len())
    }

    /// Header with name, and content, each take a multiple of four bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.output
            .write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, device and content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    fn read(mut archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        while !archive.is_empty() {
            assert_eq!(&archive[..6], b"070701");
            let field = |n: usize| {
                let digits = std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let content = (110 + name_size).next_multiple_of(4);
            assert_eq!(archive[109 + name_size], 0);
            entries.push((
                String::from_utf8(archive[110..109 + name_size].to_vec()).unwrap(),
                field(1),
                (field(9), field(10)),
                archive[content..content + size].to_vec(),
            ));
            archive = &archive[content + size.next_multiple_of(4)..];
        }
        entries
    }

    #[test]
    fn entries_are_where_a_reader_looks() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("dev", 0o755).unwrap();
        archive.char_device("dev/console", 0o600, (5, 1)).unwrap();
        for len in 0..9 {
            archive
                .file(&"n".repeat(len + 1), 0o644, &vec![7; len])
                .unwrap();
        }
        let entries = read(&archive.finish().unwrap());
        assert_eq!(entries[0], ("dev".into(), 0o040_755, (0, 0), vec![]));
        assert_eq!(
            entries[1],
            ("dev/console".into(), 0o020_600, (5, 1), vec![])
        );
        for len in 0..9 {
            assert_eq!(entries[2 + len].0, "n".repeat(len + 1));
            assert_eq!(entries[2 + len].3, vec![7; len]);
        }
        assert_eq!(entries[11].0, "TRAILER!!!");
        assert_eq!(entries.len(), 12);
    }
}
