//! Known holes of packages: records of OSV, as a list or under `vulns`, or the JSON file of the Debian
//! security tracker. Of a file only what concerns packages that are installed is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::packages::{Package, Packages, Release, version};
use super::report::Severity;

/// A hole in what is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hole {
    /// What it is called, as `CVE-2024-0001`.
    pub id: String,
    /// In which package.
    pub package: String,
    /// In which version of it.
    pub version: String,
    /// In which version it is mended; `None` if in none.
    pub fixed: Option<String>,
    /// How bad it is.
    pub severity: Severity,
}

/// The holes that a file knows in these packages of this distribution.
///
/// # Errors
/// The file cannot be read, or is neither kind.
pub fn compare(path: &Path, packages: &Packages, release: &Release) -> io::Result<Vec<Hole>> {
    let file = BufReader::new(File::open(path)?);
    let mut reader = serde_json::Deserializer::from_reader(file);
    let mut found = Found {
        packages,
        release,
        holes: BTreeMap::new(),
    };
    reader.deserialize_any(Top(&mut found))?;
    reader.end()?;
    Ok(found.holes.into_values().collect())
}

struct Found<'a> {
    packages: &'a Packages,
    release: &'a Release,
    /// By package and name.
    holes: BTreeMap<(String, String), Hole>,
}

impl Found<'_> {
    fn add(&mut self, id: &str, package: &Package, fixed: Option<String>, severity: Severity) {
        let hole = Hole {
            id: id.to_owned(),
            package: package.name.clone(),
            version: package.version.to_string(),
            fixed,
            severity,
        };
        self.holes
            .insert((package.name.clone(), id.to_owned()), hole);
    }

    fn osv(&mut self, record: Osv) {
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
            let packages = self.packages;
            // Of Debian and Ubuntu these are names of source packages.
            for package in packages.by_source.get(&of.name).into_iter().flatten() {
                if let Some(fixed) = affected.hits(package) {
                    self.add(&record.id, package, fixed, record.severity(affected));
                }
            }
        }
    }

    fn tracker(&mut self, source: &str, holes: BTreeMap<String, Tracked>) {
        if self.release.id != "debian" {
            return;
        }
        let packages = self.packages;
        for package in packages.by_source.get(source).into_iter().flatten() {
            for (id, hole) in &holes {
                let Some(here) = hole.releases.get(&self.release.codename) else {
                    continue;
                };
                let fixed = here.fixed_version.as_deref();
                let is_open = match (here.status.as_str(), fixed) {
                    // Never was in this release.
                    ("resolved", Some("0")) => false,
                    ("resolved", Some(fixed)) => match version(fixed) {
                        Some(fixed) => package.source_version < fixed,
                        None => false,
                    },
                    ("open", _) => true,
                    _ => false,
                };
                if is_open {
                    let fixed = fixed.map(str::to_owned);
                    self.add(id, package, fixed, of_urgency(here.urgency.as_deref()));
                }
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
    /// Whether a package has it, and in which version it is mended, if in one.
    fn hits(&self, package: &Package) -> Option<Option<String>> {
        let installed = &package.source_version;
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

/// All of a file.
struct Top<'a, 'b>(&'a mut Found<'b>);

impl<'de> Visitor<'de> for Top<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of OSV records, an object with such a list as vulns, or the JSON file of the Debian security tracker")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(record) = list.next_element()? {
            self.0.osv(record);
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let sources: BTreeSet<_> = self.0.packages.by_source.keys().cloned().collect();
        let mut is_any = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "vulns" {
                map.next_value_seed(List(self.0))?;
            } else if sources.contains(&key) {
                let holes = map.next_value()?;
                self.0.tracker(&key, holes);
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

struct List<'a, 'b>(&'a mut Found<'b>);

impl<'de> DeserializeSeed<'de> for List<'_, '_> {
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

    fn found(file: &Value) -> Vec<(String, String, Option<String>, Severity)> {
        let packages = parse(
            "Package: libssl3\nStatus: install ok installed\nSource: openssl\nVersion: 3.0.11-1~deb12u2\n\n\
             Package: bash\nStatus: install ok installed\nVersion: 5.2.15-2\n",
        );
        let release = Release::parse("ID=debian\nVERSION_ID=12\nVERSION_CODENAME=bookworm\n");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        std::fs::write(&path, file.to_string()).unwrap();
        let holes = compare(&path, &packages, &release).unwrap();
        let holes = holes.into_iter();
        holes
            .map(|hole| (hole.id, hole.package, hole.fixed, hole.severity))
            .collect()
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
                text("libssl3"),
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
                    text("libssl3"),
                    Some(text("3.0.11-1~deb12u3")),
                    Severity::High
                ),
            ]
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
