//! Known holes of packages: records of OSV, as a list or under `vulns`, or the JSON file of the Debian
//! security tracker. Of a file only what concerns packages that are installed is kept.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use debversion::Version;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::packages::{Packages, Release, version};
use super::report::Severity;

/// The most holes that are named of the packages of one version of a source package.
const MAX_NAMED: usize = 20;
/// The most that are named of one guest; of the others only the number and the worst are kept.
const MAX_NAMED_IN_ALL: usize = 40_000;

/// A hole in what is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hole {
    /// In which version it is mended; `None` if in none.
    pub fixed: Option<String>,
    /// How bad it is.
    pub severity: Severity,
}

/// The holes of the packages that were built of one version of a source package.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holes {
    /// Some of them, by what they are called, as `CVE-2024-0001`.
    pub named: BTreeMap<String, Hole>,
    /// How many more there are.
    pub more: usize,
    /// How bad the worst is.
    pub worst: Option<Severity>,
    /// What the last one is called, which the file may tell twice.
    last: String,
}

/// Holes by the name and the version of the source package.
pub type HolesBySource<'a> = BTreeMap<(&'a str, &'a Version), Holes>;

/// The holes that a file knows in these packages of this distribution.
///
/// # Errors
/// The file cannot be read, or is neither kind.
pub fn compare<'a>(
    path: &Path,
    packages: &'a Packages,
    release: &Release,
) -> io::Result<HolesBySource<'a>> {
    let file = BufReader::new(File::open(path)?);
    let mut reader = serde_json::Deserializer::from_reader(file);
    let mut found = Found {
        packages,
        release,
        holes: BTreeMap::new(),
        room: MAX_NAMED_IN_ALL,
    };
    reader.deserialize_any(Top(&mut found))?;
    reader.end()?;
    Ok(found.holes)
}

struct Found<'a, 'b> {
    packages: &'a Packages,
    release: &'b Release,
    holes: HolesBySource<'a>,
    /// How many more holes are named.
    room: usize,
}

impl<'a> Found<'a, '_> {
    /// A source package that something installed was built of, and its versions.
    fn source(&self, name: &str) -> Option<(&'a str, impl Iterator<Item = &'a Version> + use<'a>)> {
        let (name, versions) = self.packages.by_source.get_key_value(name)?;
        Some((name, versions.keys()))
    }

    fn add(&mut self, of: (&'a str, &'a Version), id: &str, hole: Hole) {
        let holes = self.holes.entry(of).or_default();
        holes.worst = holes.worst.max(Some(hole.severity));
        if let Some(known) = holes.named.get_mut(id) {
            *known = hole;
        } else if self.room > 0 && holes.named.len() < MAX_NAMED {
            self.room -= 1;
            holes.named.insert(id.to_owned(), hole);
        } else if holes.last != id {
            id.clone_into(&mut holes.last);
            holes.more += 1;
        }
    }

    fn osv(&mut self, record: &Osv) {
        if record.withdrawn.is_some() {
            return;
        }
        for affected in &record.affected {
            let Some(of) = &affected.package else {
                continue;
            };
            if !self.release.is_ecosystem(&of.ecosystem) {
                continue;
            }
            // Of Debian and Ubuntu these are names of source packages.
            let Some((source, versions)) = self.source(&of.name) else {
                continue;
            };
            for version in versions {
                if let Some(fixed) = affected.hits(version) {
                    let severity = record.severity(affected);
                    self.add((source, version), &record.id, Hole { fixed, severity });
                }
            }
        }
    }

    fn tracker(&mut self, source: &str, holes: &BTreeMap<String, Tracked>) {
        if self.release.id != "debian" {
            return;
        }
        let Some((source, versions)) = self.source(source) else {
            return;
        };
        let versions: Vec<_> = versions.collect();
        for (id, hole) in holes {
            let Some(here) = hole.releases.get(&self.release.codename) else {
                continue;
            };
            let Some(is_open) = here.openness() else {
                continue;
            };
            for version in versions.iter().copied().filter(|version| is_open(version)) {
                let hole = Hole {
                    fixed: here.fixed_version.clone(),
                    severity: of_urgency(here.urgency.as_deref()),
                };
                self.add((source, version), id, hole);
            }
        }
    }
}

/// By the word of the Debian security team.
fn of_urgency(urgency: Option<&str>) -> Severity {
    match urgency.map(|word| word.trim_end_matches('*')) {
        Some("high") => Severity::High,
        Some("medium" | "not yet assigned") | None => Severity::Medium,
        Some("unimportant") => Severity::Info,
        Some(_) => Severity::Low,
    }
}

/// A record of OSV, as far as it matters here.
#[derive(Deserialize)]
struct Osv {
    id: String,
    #[serde(default)]
    withdrawn: Option<String>,
    #[serde(default)]
    affected: Vec<Affected>,
    #[serde(default)]
    database_specific: Specific,
}

#[derive(Deserialize)]
struct Affected {
    package: Option<OsvPackage>,
    #[serde(default)]
    ranges: Vec<Range>,
    #[serde(default)]
    versions: Vec<String>,
    #[serde(default)]
    ecosystem_specific: Specific,
}

#[derive(Deserialize)]
struct OsvPackage {
    ecosystem: String,
    name: String,
}

#[derive(Deserialize)]
struct Range {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    events: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    introduced: Option<String>,
    fixed: Option<String>,
    last_affected: Option<String>,
}

#[derive(Default, Deserialize)]
struct Specific {
    #[serde(default)]
    severity: Option<String>,
    #[serde(default)]
    urgency: Option<String>,
}

impl Osv {
    fn severity(&self, affected: &Affected) -> Severity {
        let urgency = affected.ecosystem_specific.urgency.as_deref();
        match (self.database_specific.severity.as_deref(), urgency) {
            (None, urgency) => of_urgency(urgency),
            (Some(word), _) => match word.to_ascii_lowercase().as_str() {
                "critical" => Severity::Critical,
                "high" => Severity::High,
                "low" => Severity::Low,
                _ => Severity::Medium,
            },
        }
    }
}

impl Affected {
    /// Whether a version of the source package has it, and in which it is mended, if in one.
    fn hits(&self, installed: &Version) -> Option<Option<String>> {
        for range in self.ranges.iter().filter(|range| range.kind == "ECOSYSTEM") {
            let (mut is_in, mut fixed) = (false, None);
            for step in &range.events {
                if let Some(start) = &step.introduced {
                    is_in |=
                        start == "0" || version(start).is_some_and(|start| start <= *installed);
                }
                if let Some(end) = &step.fixed {
                    match version(end) {
                        Some(end) if end <= *installed => is_in = false,
                        _ => fixed = fixed.or(Some(end.clone())),
                    }
                }
                if let Some(last) = &step.last_affected {
                    is_in &= version(last).is_none_or(|last| *installed <= last);
                }
            }
            if is_in {
                return Some(fixed);
            }
        }
        let is_named = || {
            let mut named = self.versions.iter().filter_map(|named| version(named));
            named.any(|named| named == *installed)
        };
        (self.ranges.is_empty() && is_named()).then_some(None)
    }
}

/// A hole as the tracker tells it, as far as it matters here.
#[derive(Deserialize)]
struct Tracked {
    #[serde(default)]
    releases: BTreeMap<String, InRelease>,
}

#[derive(Deserialize)]
struct InRelease {
    status: String,
    #[serde(default)]
    fixed_version: Option<String>,
    #[serde(default)]
    urgency: Option<String>,
}

impl InRelease {
    /// Tells whether a version of the source package has the hole; `None` if none has.
    fn openness(&self) -> Option<impl Fn(&Version) -> bool> {
        let fixed = match (self.status.as_str(), self.fixed_version.as_deref()) {
            // Never was in this release.
            ("resolved", Some("0")) => return None,
            ("resolved", Some(fixed)) => Some(version(fixed)?),
            ("open", _) => None,
            _ => return None,
        };
        Some(move |installed: &Version| fixed.as_ref().is_none_or(|fixed| installed < fixed))
    }
}

/// All of a file.
struct Top<'a, 'b, 'c>(&'a mut Found<'b, 'c>);

impl<'de> Visitor<'de> for Top<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of OSV records, an object with such a list as vulns, or the JSON file of the Debian security tracker")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(record) = list.next_element::<Osv>()? {
            self.0.osv(&record);
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut is_any = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "vulns" {
                map.next_value_seed(List(self.0))?;
            } else if self.0.packages.by_source.contains_key(&key) {
                let holes = map.next_value()?;
                self.0.tracker(&key, &holes);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
            is_any = true;
        }
        match is_any {
            true => Ok(()),
            false => Err(A::Error::custom("the file is empty")),
        }
    }
}

struct List<'a, 'b, 'c>(&'a mut Found<'b, 'c>);

impl<'de> DeserializeSeed<'de> for List<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, list: D) -> Result<(), D::Error> {
        list.deserialize_seq(Top(self.0))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::packages::parse;
    use super::*;

    const STATUS: &str = "Package: libssl3\nStatus: install ok installed\nSource: openssl\n\
                          Version: 3.0.11-1~deb12u2\n\nPackage: bash\n\
                          Status: install ok installed\nVersion: 5.2.15-2\n";

    /// What a file comes to in Debian 12 with the packages of this status file.
    fn compared<T>(status: &str, file: &Value, look: impl FnOnce(HolesBySource<'_>) -> T) -> T {
        let packages = parse(status);
        let release = Release::parse("ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\n");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        std::fs::write(&path, file.to_string()).unwrap();
        look(compare(&path, &packages, &release).unwrap())
    }

    fn found(file: &Value) -> Vec<(String, String, Option<String>, Severity)> {
        compared(STATUS, file, |holes| {
            let named = holes.into_iter().flat_map(|((source, _), holes)| {
                assert_eq!(holes.more, 0);
                let worst = holes.named.values().map(|hole| hole.severity).max();
                assert_eq!(holes.worst, worst);
                let named = holes.named.into_iter();
                named.map(|(id, hole)| (id, source.to_owned(), hole.fixed, hole.severity))
            });
            named.collect()
        })
    }

    fn osv(id: &str, ecosystem: &str, name: &str, events: Value) -> Value {
        json!({
            "id": id, "schema_version": "1.6.0", "aliases": [],
            "affected": [{
                "package": {"ecosystem": ecosystem, "name": name},
                "ranges": [{"type": "ECOSYSTEM", "events": events}],
                "ecosystem_specific": {"urgency": "not yet assigned"},
            }],
        })
    }

    #[test]
    fn osv_records_are_compared_by_their_ranges() {
        let from_0 = |end: &str| json!([{"introduced": "0"}, {"fixed": end}]);
        let records = json!([
            osv("CVE-1", "Debian:12", "openssl", from_0("3.0.11-1~deb12u3")),
            osv("CVE-2", "Debian:12", "openssl", from_0("3.0.11-1~deb12u2")),
            osv("CVE-3", "Debian:11", "openssl", from_0("9")),
            osv("CVE-4", "Debian:12", "bash", json!([{"introduced": "0"}])),
            osv("CVE-5", "Debian:12", "bash", json!([{"introduced": "6"}])),
            osv("CVE-6", "Debian:12", "other", from_0("9")),
            osv("CVE-7", "Debian:12", "bash", json!([{"introduced": "0"}, {"last_affected": "5.1"}])),
            {"id": "CVE-8", "withdrawn": "2024-01-01T00:00:00Z", "affected": [{
                "package": {"ecosystem": "Debian:12", "name": "bash"}, "versions": ["5.2.15-2"]}]},
            {"id": "CVE-9", "database_specific": {"severity": "CRITICAL"}, "affected": [{
                "package": {"ecosystem": "Debian:12", "name": "bash"}, "versions": ["5.2.15-2"]}]},
        ]);
        let text = |text: &str| text.to_owned();
        let expected = [
            (text("CVE-4"), text("bash"), None, Severity::Medium),
            (text("CVE-9"), text("bash"), None, Severity::Critical),
            (
                text("CVE-1"),
                text("openssl"),
                Some(text("3.0.11-1~deb12u3")),
                Severity::Medium,
            ),
        ];
        assert_eq!(found(&records), expected);
        assert_eq!(found(&json!({"vulns": records})), expected);
    }

    #[test]
    fn the_trackers_file_is_compared_by_release() {
        let in_release = |status: &str, fixed: Option<&str>, urgency: &str| {
            json!({"description": "x", "releases": {
                "bookworm": {"status": status, "fixed_version": fixed, "urgency": urgency,
                             "repositories": {"bookworm": "1"}},
                "trixie": {"status": "open", "urgency": "high"}}})
        };
        let tracker = json!({
            "openssl": {
                "CVE-1": in_release("resolved", Some("3.0.11-1~deb12u3"), "high"),
                "CVE-2": in_release("resolved", Some("3.0.11-1~deb12u1"), "high"),
                "CVE-3": in_release("resolved", Some("0"), "high"),
            },
            "bash": {
                "CVE-4": in_release("open", None, "unimportant"),
                "CVE-5": in_release("undetermined", None, "low"),
            },
            "else": {"CVE-6": 7},
        });
        let text = |text: &str| text.to_owned();
        assert_eq!(
            found(&tracker),
            [
                (text("CVE-4"), text("bash"), None, Severity::Info),
                (
                    text("CVE-1"),
                    text("openssl"),
                    Some(text("3.0.11-1~deb12u3")),
                    Severity::High
                ),
            ]
        );
    }

    #[test]
    fn holes_beyond_those_that_are_named_are_counted() {
        let versions = 40;
        let status = (0..versions).map(|version| {
            let package = format!("Package: p{version}\nSource: linux (1.{version})\nVersion: 1\n");
            package + "Status: install ok installed\n\n"
        });
        let status: String = status.collect();
        let hole = |urgency: &str| {
            json!({"releases": {"bookworm": {
                "status": "resolved", "fixed_version": "2", "urgency": urgency}}})
        };
        let count = MAX_NAMED + 10;
        let holes = (0..count).map(|id| (format!("CVE-{id:05}"), hole("low")));
        let holes: serde_json::Map<_, _> = holes.chain([("CVE-x".into(), hole("high"))]).collect();
        compared(&status, &json!({"linux": holes}), |found| {
            assert_eq!(found.len(), versions);
            for holes in found.values() {
                assert_eq!(holes.named.len(), MAX_NAMED);
                assert_eq!(holes.named.len() + holes.more, count + 1);
                assert_eq!(holes.worst, Some(Severity::High));
            }
        });
        let again = json!([{"introduced": "0"}]);
        let mut records: Vec<_> = (0..MAX_NAMED + 2)
            .map(|id| osv(&format!("CVE-{id}"), "Debian:12", "bash", again.clone()))
            .collect();
        // Of the same record a package is affected once.
        for record in &mut records {
            let affected = record["affected"].as_array_mut().unwrap();
            affected.push(affected[0].clone());
        }
        compared(STATUS, &json!(records), |found| {
            let holes = found.values().next().unwrap();
            assert_eq!((holes.named.len(), holes.more), (MAX_NAMED, 2));
        });
    }

    #[test]
    fn holes_that_are_named_are_bounded_in_all() {
        let packages = Packages::default();
        let version = version("1").unwrap();
        let sources: Vec<_> = (0..MAX_NAMED_IN_ALL + 2)
            .map(|index| index.to_string())
            .collect();
        let mut found = Found {
            packages: &packages,
            release: &Release::default(),
            holes: BTreeMap::new(),
            room: MAX_NAMED_IN_ALL,
        };
        for source in &sources {
            let (fixed, severity) = (None, Severity::Low);
            found.add((source, &version), "CVE-1", Hole { fixed, severity });
        }
        let holes = found.holes.values();
        assert_eq!(holes.clone().filter(|holes| holes.more == 1).count(), 2);
        assert!(
            holes
                .clone()
                .all(|holes| holes.worst == Some(Severity::Low))
        );
    }

    #[test]
    fn what_is_neither_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        for bad in ["", "7", "{}", "[7]", "{\"bash\": 7}", "[] []"] {
            std::fs::write(&path, bad).unwrap();
            let packages = parse("Package: bash\nStatus: install ok installed\nVersion: 1\n");
            assert!(
                compare(&path, &packages, &Release::default()).is_err(),
                "{bad}"
            );
        }
    }
}
