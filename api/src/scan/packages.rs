//! Packages of a guest, by its `dpkg` status file, and which Debian they are of.

use std::collections::BTreeMap;
use std::str::FromStr;

use debversion::Version;

/// The most packages that are looked at.
const MAX_PACKAGES: usize = 50_000;
/// The most versions of one source package that are looked at, each of which is compared with all of its
/// holes: more than there are kernels in a guest.
const MAX_VERSIONS: usize = 64;
/// The longest name or version, in bytes.
const MAX_WORD: usize = 128;

/// A package that is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: Version,
}

/// What is installed, and what could not be understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packages {
    /// Packages by the names of the source packages that they were built of, and by the versions of those.
    pub by_source: BTreeMap<String, BTreeMap<Version, Vec<Package>>>,
    /// How many there are.
    pub count: usize,
    /// How many entries make no sense, or are more than are looked at.
    pub left_out: usize,
}

impl Packages {
    /// Whether it was added, and is not one too many.
    fn add(&mut self, package: Package, source: &str, source_version: Version) -> bool {
        if self.count == MAX_PACKAGES {
            return false;
        }
        let versions = self.by_source.entry(source.to_owned()).or_default();
        if versions.len() == MAX_VERSIONS && !versions.contains_key(&source_version) {
            return false;
        }
        versions.entry(source_version).or_default().push(package);
        self.count += 1;
        true
    }
}

/// The packages of a `dpkg` status file.
pub fn parse(status: &str) -> Packages {
    let mut packages = Packages::default();
    for paragraph in status.split("\n\n") {
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
        let is_added = package(field)
            .is_some_and(|(package, source, version)| packages.add(package, source, version));
        packages.left_out += usize::from(!is_added);
    }
    packages
}

/// A package, with the name and the version of its source package.
fn package<'a>(field: impl Fn(&str) -> Option<&'a str>) -> Option<(Package, &'a str, Version)> {
    let name = word(field("Package")?)?;
    let version = version(field("Version")?)?;
    let source = field("Source").unwrap_or(name);
    let (source, source_version) = match source.split_once(" (") {
        Some((source, rest)) => (source, self::version(rest.strip_suffix(')')?)?),
        None => (source, version.clone()),
    };
    let name = name.to_owned();
    Some((Package { name, version }, word(source)?, source_version))
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
        assert_eq!((packages.count, packages.left_out), (2, 1));
        let built_of = |source: &str, of: &str| {
            let built = &packages.by_source[source][&version(of).unwrap()];
            (built[0].name.clone(), built[0].version.to_string())
        };
        let libc = ("libc6".to_owned(), "2.36-9+deb12u8".to_owned());
        assert_eq!(built_of("glibc", "2.36-9+deb12u8"), libc);
        let bash = ("bash".to_owned(), "5.2.15-2+b7".to_owned());
        assert_eq!(built_of("bash", "5.2.15-2"), bash);
    }

    #[test]
    fn packages_that_are_too_many_are_counted() {
        let package = |name: usize, version: usize| {
            format!(
                "Package: p{name}\nStatus: a b installed\nSource: x ({version})\nVersion: 1\n\n"
            )
        };
        let versions: String = (0..MAX_VERSIONS + 3)
            .map(|version| package(0, version))
            .collect();
        let packages = parse(&(versions + &package(1, 0)));
        assert_eq!(packages.by_source["x"].len(), MAX_VERSIONS);
        assert_eq!((packages.count, packages.left_out), (MAX_VERSIONS + 1, 3));
        let many: String = (0..MAX_PACKAGES + 2).map(|name| package(name, 0)).collect();
        let packages = parse(&many);
        assert_eq!((packages.count, packages.left_out), (MAX_PACKAGES, 2));
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
