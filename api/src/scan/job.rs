//! One scan.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::warn;

use super::advisories::{Holes, HolesBySource};
use super::control::Area;
use super::evidence::{MAX_EVIDENCE, Reader};
use super::packages::{self, Package, Packages, Release};
use super::report::{Check, Details, Report, Results, Severity, Verdict};
use super::turns::ScanTurn;
use super::{MAX_MACHINES, MAX_TIME, Scan, ScanKind, advisories, guest, host};
use crate::audit::AuditLog;
use crate::chain;
use crate::domain::{HostError, Manager, Sandbox, Status};

/// The largest `os-release`, in bytes.
const MAX_RELEASE: usize = 1 << 16;
/// What is affected by checks of the daemon itself.
const DAEMON: &str = "daemon";

static LEFT_OUT: Check = Check {
    id: "machines.left_out",
    failure: "Not all machines were looked at",
    recommendation: "Scan the others by their names",
    severity: Severity::Low,
    area: Area::Files,
};
static NOT_SEEN: Check = Check {
    id: "guest.not_inspected",
    failure: "The guest was not looked into",
    recommendation: "Start the machine, and scan it again",
    severity: Severity::Low,
    area: Area::Files,
};
static NOT_HELD: Check = Check {
    id: "host.not_inspected",
    failure: "What holds the machine on the host was not looked at",
    recommendation: "Look into the daemon's log",
    severity: Severity::Low,
    area: Area::Isolation,
};
static PACKAGES_NOT_SEEN: Check = Check {
    id: "package.not_compared",
    failure: "Packages were not compared with known holes",
    recommendation: "See the details",
    severity: Severity::Low,
    area: Area::Vulnerabilities,
};
static AUDIT: Check = Check {
    id: "daemon.audit_log",
    failure: "The audit log was changed by somebody else than the daemon",
    recommendation: "Run sandboxd audit verify, and find out who can write the data directory",
    severity: Severity::Critical,
    area: Area::Audit,
};

/// A scan that is under way.
pub struct Job<'a> {
    /// Acts for who has asked for it.
    pub manager: &'a Manager,
    /// The scan.
    pub scan: &'a Scan,
    /// How many machines are not looked at, since they are too many.
    pub left_out: u64,
    /// Known holes of packages.
    pub advisories: Option<&'a Path>,
    /// The audit log.
    pub audit: &'a AuditLog,
}

/// Why a guest was not looked into.
enum Unseen {
    /// Its state does not allow it.
    NotRunning,
    /// It does not answer as it should.
    Host(HostError),
    /// It takes too long.
    Slow,
}

impl Unseen {
    fn sentence(&self) -> String {
        match self {
            Self::NotRunning => "it does not run, and only one that runs is looked into".into(),
            Self::Host(source) => chain(source),
            Self::Slow => format!("it took longer than {} s", MAX_TIME.as_secs()),
        }
    }
}

impl Job<'_> {
    /// What all of it comes to, and how long it was at work. Each machine waits for its turn.
    pub async fn run(&self, machines: &[Sandbox], turn: &ScanTurn<'_>) -> (Results, Duration) {
        let mut report = Report::new(&self.scan.frameworks);
        let mut work = Duration::ZERO;
        if self.scan.kind == ScanKind::Compliance && report.wants(AUDIT.area) {
            let _turn = turn.guest().await;
            let began = Instant::now();
            self.look_at_audit(&mut report).await;
            work += began.elapsed();
        }
        if self.left_out > 0 {
            let why = format_args!(
                "{} machines are older than the latest {}, which are those that a scan of all looks at",
                self.left_out, MAX_MACHINES
            );
            report.add(&LEFT_OUT, DAEMON, Verdict::warning(why));
        }
        for machine in machines {
            let _turn = turn.guest().await;
            let began = Instant::now();
            match self.scan.kind {
                ScanKind::Vulnerability => self.compare_packages(machine, &mut report).await,
                ScanKind::Compliance | ScanKind::Configuration => {
                    self.look_at(machine, &mut report).await;
                }
            }
            work += began.elapsed();
        }
        (report.finish(), work)
    }

    async fn look_at_audit(&self, report: &mut Report) {
        let path = self.audit.path().to_owned();
        let verified = tokio::task::spawn_blocking(move || crate::audit::verify(&path)).await;
        let verdict = match verified {
            Ok(Ok(_)) => Verdict::Passed,
            Ok(Err(source)) => Verdict::unless([chain(&source)]),
            Err(_) => Verdict::warning("it could not be verified"),
        };
        report.add(&AUDIT, DAEMON, verdict);
    }

    async fn look_at(&self, machine: &Sandbox, report: &mut Report) {
        let name = machine.shown();
        match self.manager.posture(machine).await {
            Ok(posture) => host::judge(machine, &posture, &name, report),
            Err(source) => {
                warn!(sandbox = %machine.id, error = chain(&source), "not looked at from outside");
                let why = "the host cannot tell; the daemon's log says why".to_owned();
                report.add(&NOT_HELD, &name, Verdict::warning(why));
            }
        }
        let seen = self
            .in_guest(machine, async |mut reader: Reader<'_>| {
                reader.collect().await
            })
            .await;
        match seen {
            Ok(evidence) => {
                // Passwords are tried, which takes a processor's time.
                let frameworks = self.scan.frameworks.clone();
                let judged = {
                    let name = name.clone();
                    tokio::task::spawn_blocking(move || {
                        let mut report = Report::new(&frameworks);
                        guest::judge(&evidence, &name, &mut report);
                        report
                    })
                };
                if let Ok(judged) = judged.await {
                    report.merge(judged);
                }
            }
            Err(why) => report.add(&NOT_SEEN, &name, Verdict::warning(why.sentence())),
        }
    }

    async fn compare_packages(&self, machine: &Sandbox, report: &mut Report) {
        let name = machine.shown();
        let mut warn = |why: String| {
            report.add(&PACKAGES_NOT_SEEN, &name, Verdict::warning(why));
        };
        let Some(advisories) = self.advisories else {
            return warn(
                "the daemon has no file of known holes: set scan.advisories to one of OSV or of the \
                 Debian security tracker"
                    .to_owned(),
            );
        };
        let read = async |mut reader: Reader<'_>| {
            let release = match reader.text("/etc/os-release", MAX_RELEASE).await? {
                None => reader.text("/usr/lib/os-release", MAX_RELEASE).await?,
                release => release,
            };
            let status = reader.text("/var/lib/dpkg/status", MAX_EVIDENCE).await?;
            Ok((status, release))
        };
        let (status, release) = match self.in_guest(machine, read).await {
            Ok(read) => read,
            Err(why) => return warn(why.sentence()),
        };
        let Some((status, is_whole)) = status else {
            return warn("it has no packages of dpkg".to_owned());
        };
        let release = Release::parse(release.map(|(text, _)| text).as_deref().unwrap_or_default());
        if release.id.is_empty() {
            return warn("it does not say which distribution it is".to_owned());
        }
        let mut judged = Report::new(&self.scan.frameworks);
        let (path, vm) = (advisories.to_owned(), name.clone());
        let judged = tokio::task::spawn_blocking(move || {
            let packages = packages::parse(&status);
            let holes = advisories::compare(&path, &packages, &release)?;
            if !is_whole || packages.left_out > 0 {
                let why = Verdict::warning(format_args!(
                    "{} entries of its list of packages make no sense or are too many, or it is too long",
                    packages.left_out
                ));
                judged.add(&PACKAGES_NOT_SEEN, &vm, why);
            }
            add_holes(&packages, &holes, &vm, &mut judged);
            Ok::<_, std::io::Error>(judged)
        });
        match judged.await {
            Ok(Ok(judged)) => report.merge(judged),
            Ok(Err(source)) => {
                let path = advisories.display();
                warn(format!("{path} cannot be used: {source}"));
            }
            Err(_) => warn("the comparison was broken off".to_owned()),
        }
    }

    /// What `look` sees in a machine, if that runs and answers in time.
    async fn in_guest<T>(
        &self,
        machine: &Sandbox,
        look: impl AsyncFnOnce(Reader<'_>) -> Result<T, HostError>,
    ) -> Result<T, Unseen> {
        // One that is paused stays so.
        let found = self.manager.get(machine.id.as_str()).await;
        if !found.is_ok_and(|machine| machine.status == Status::Running) {
            return Err(Unseen::NotRunning);
        }
        let seen = timeout(MAX_TIME, async {
            let in_use = self.manager.running(machine.id.as_str()).await;
            let in_use = in_use.map_err(|_| Unseen::NotRunning)?;
            let seen = look(Reader::new(self.manager, &in_use)).await;
            seen.map_err(Unseen::Host)
        });
        seen.await.unwrap_or(Err(Unseen::Slow))
    }
}

/// Each package is a check, which fails with the worst of its holes.
fn add_holes(packages: &Packages, holes: &HolesBySource<'_>, vm: &str, report: &mut Report) {
    for (source, versions) in &packages.by_source {
        for (version, packages) in versions {
            let holes = holes.get(&(source.as_str(), version));
            for package in packages {
                add_package(package, holes, vm, report);
            }
        }
    }
}

fn add_package(package: &Package, holes: Option<&Holes>, vm: &str, report: &mut Report) {
    let named = holes.into_iter().flat_map(|holes| &holes.named);
    let told = named.map(|(id, hole)| {
        fmt::from_fn(move |f| {
            write!(f, "{} {}: {id}, ", package.name, package.version)?;
            match &hole.fixed {
                Some(fixed) => write!(f, "mended in {fixed}"),
                None => f.write_str("not mended yet"),
            }
        })
    });
    let mut details: Details = told.collect();
    details.add_untold(holes.map_or(0, |holes| holes.more));
    let check = Check {
        id: "package.hole",
        failure: "A package has known holes",
        recommendation: "Install the version that mends them, where there is one: apt-get upgrade",
        severity: holes
            .and_then(|holes| holes.worst)
            .unwrap_or(Severity::Info),
        area: Area::Vulnerabilities,
    };
    report.add(&check, vm, details.into());
}
