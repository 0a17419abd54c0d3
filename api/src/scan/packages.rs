//! Packages of a guest, by its `dpkg` status file, and which Debian they are of.

use std::collections::BTreeMap;
use std::str::FromStr;

use debversion::Version;

/// The most packages that are looked at.
const MAX_PACKAGES: usize = 50_000;
/// The longest name or version, in bytes.
const MAX_WORD: usize = 128;

/// A package that is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: Version,
    /// Name of the source package that it was built of.
    pub source: String,
    /// Version of that.
    pub source_version: Version,
}

/// What is installed, and what could not be understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packages {
    /// Packages by the names of their sources.
    pub by_source: BTreeMap<String, Vec<Package>>,
    /// How many there are.
    pub count: usize,
    /// How many entries made no sense.
    pub unknown: usize,
}

/// The packages of a `dpkg` status file.
pub fn parse(status: &str) -> Packages {
    let mut packages = Packages::default();
    for paragraph in status.split("\n\n").take(MAX_PACKAGES) {
        let field = |name: &str| {
            let mut lines = paragraph.lines();
            lines
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        // Wanted, without an error, and installed.
        let is_installed = field("Status").is_some_and(|words| words.ends_with(" installed"));
        if !is_installed {
            continue;
        }
        match package(field) {
            Some(package) => {
                packages.count += 1;
                let of_source = packages.by_source.entry(package.source.clone());
                of_source.or_default().push(package);
            }
            None => packages.unknown += 1,
        }
    }
    packages
}

fn package<'a>(field: impl Fn(&str) -> Option<&'a str>) -> Option<Package> {
    let name = word(field("Package")?)?;
    let version = version(field("Version")?)?;
    let source = field("Source").unwrap_or(name);
    let (source, source_version) = match source.split_once(" (") {
        Some((source, rest)) => (source, self::version(rest.strip_suffix(')')?)?),
        None => (source, version.clone()),
    };
    Some(Package {
        name: name.to_owned(),
        source: word(source)?.to_owned(),
        version,
        source_version,
    })
}

/// A name of a package.
fn word(text: &str) -> Option<&str> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
    let is_name = (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(is_allowed);
    is_name.then_some(text)
}

/// A version; what is longer than any is none.
pub fn version(text: &str) -> Option<Version> {
    (text.len() <= MAX_WORD && text.is_ascii()).then(|| Version::from_str(text).ok())?
}

/// Which distribution a guest is, by its `os-release`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Release {
    /// `debian`, for example.
    pub id: String,
    /// `12`, for example.
    pub version: String,
    /// `bookworm`, for example.
    pub codename: String,
}

impl Release {
    /// Of a file `os-release`.
    pub fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let mut lines = text.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            let value = value.unwrap_or_default().trim().trim_matches('"');
            word(value).unwrap_or_default().to_owned()
        };
        Self {
            id: field("ID"),
            version: field("VERSION_ID"),
            codename: field("VERSION_CODENAME"),
        }
    }

    /// Whether an ecosystem of OSV is this distribution: `Debian:12`, or `Ubuntu:22.04:LTS`.
    pub fn is_ecosystem(&self, ecosystem: &str) -> bool {
        let mut parts = ecosystem.split(':');
        let id = parts.next().unwrap_or_default();
        // `Ubuntu:Pro:22.04:LTS` is of updates that are not everybody's.
        id.eq_ignore_ascii_case(&self.id)
            && !self.version.is_empty()
            && parts.next() == Some(self.version.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_read_with_their_sources() {
        let status = "Package: libc6\nStatus: install ok installed\nSource: glibc\nVersion: 2.36-9+deb12u8\n\
                      Description: x\n Version: 9\n\nPackage: bash\nStatus: install ok installed\n\
                      Source: bash (5.2.15-2)\nVersion: 5.2.15-2+b7\n\nPackage: gone\n\
                      Status: deinstall ok config-files\nVersion: 1\n\nPackage: bad\n\
                      Status: install ok installed\nVersion: 1 2\n\nnonsense";
        let packages = parse(status);
        assert_eq!((packages.count, packages.unknown), (2, 1));
        let glibc = &packages.by_source["glibc"][0];
        assert_eq!(glibc.name, "libc6");
        assert_eq!(glibc.source_version, version("2.36-9+deb12u8").unwrap());
        let bash = &packages.by_source["bash"][0];
        assert_eq!(bash.version, version("5.2.15-2+b7").unwrap());
        assert_eq!(bash.source_version, version("5.2.15-2").unwrap());
    }

    #[test]
    fn versions_are_compared_as_debian_does() {
        for (less, more) in [
            ("1.0~rc1-1", "1.0-1"),
            ("1.9-1", "1.10-1"),
            ("9.9-1", "1:0.1-1"),
            ("2.36-9+deb12u8", "2.36-9+deb12u10"),
            ("5.2.15-2", "5.2.15-2+b7"),
        ] {
            assert!(
                version(less).unwrap() < version(more).unwrap(),
                "{less} {more}"
            );
        }
        assert_eq!(version("1\u{e9}"), None);
        assert_eq!(version(&"1".repeat(500)), None);
    }

    #[test]
    fn a_release_is_known_by_its_ecosystem() {
        let debian =
            Release::parse("NAME=x\nVERSION_ID=\"12\"\nID=debian\nVERSION_CODENAME=bookworm\n");
        assert_eq!(debian.codename, "bookworm");
        assert!(debian.is_ecosystem("Debian:12"));
        assert!(!debian.is_ecosystem("Debian:11") && !debian.is_ecosystem("Debian"));
        let ubuntu = Release::parse("ID=ubuntu\nVERSION_ID=\"22.04\"");
        assert!(ubuntu.is_ecosystem("Ubuntu:22.04:LTS"));
        assert!(!ubuntu.is_ecosystem("Ubuntu:Pro:22.04:LTS"));
        assert!(!Release::parse("").is_ecosystem(""));
    }
}
