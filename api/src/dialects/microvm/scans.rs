//! Security scans.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::AtVm;
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::fields::Fields;
use super::rfc3339;
use crate::http::{AppState, Caller};
use crate::scan::{Finding, Framework, Results, Scan, ScanError, ScanKind, ScanSpec};

/// The scan that is asked for.
#[derive(ToSchema)]
#[schema(as = ScanRequest)]
#[allow(
    dead_code,
    reason = "only described by it: the fields are read one by one"
)]
pub struct ScanRequest {
    /// `vulnerability`, `compliance` or `configuration`.
    pub scan_type: String,
    /// Name or id of a machine, or `all`: those that the caller may see.
    pub target: String,
    /// Checks that count for none of these are left out: `SOC2`, `HIPAA`, `PCI_DSS`, `GDPR`, `ISO27001`,
    /// `NIST`. Without any, none is.
    #[schema(nullable = false)]
    pub frameworks: Option<Vec<String>>,
}

/// A scan was started.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ScanStarted)]
pub struct StartedBody {
    /// Its name.
    #[schema(example = "sc-0a1b2c3d")]
    pub scan_id: String,
    /// `started`.
    pub status: &'static str,
    /// When.
    #[schema(format = DateTime)]
    pub started_at: String,
    /// When it will probably have ended, by how long such scans took before.
    #[schema(format = DateTime)]
    pub estimated_completion: String,
}

/// A scan.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Scan)]
pub struct ScanBody {
    /// Its name.
    pub scan_id: String,
    /// `started`, `completed`, `failed` or `cancelled`.
    pub status: &'static str,
    /// Why it has failed or was cancelled.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub status_reason: Option<String>,
    /// When it was asked for.
    #[schema(format = DateTime)]
    pub started_at: String,
    /// When it will probably have ended.
    #[schema(format = DateTime)]
    pub estimated_completion: String,
    /// When it has ended.
    #[schema(format = DateTime)]
    pub completed_at: Option<String>,
    /// What it looks at.
    pub scan_type: &'static str,
    /// Name of the machine, or `all`.
    pub target: String,
    /// Whose controls selected checks; all, if there are none.
    pub frameworks: Vec<&'static str>,
    /// What it came to, once it is completed.
    pub results: Option<ResultsBody>,
}

/// What a scan came to.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ScanResults)]
pub struct ResultsBody {
    /// Checks that came to something.
    pub total_checks: u32,
    /// Those that found all as it should be.
    pub passed: u32,
    /// Those that did not.
    pub failed: u32,
    /// Those that found something to look at, or could not look.
    pub warnings: u32,
    /// Those that had nothing to look at; they are not among `total_checks`.
    pub not_applicable: u32,
    /// 0 to 100, more is worse.
    pub risk_score: u32,
    /// What to do, worst first.
    pub findings: Vec<FindingBody>,
    /// How many findings are not among these, since there are too many.
    pub findings_left_off: u32,
}

/// Something to do.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ScanFinding)]
pub struct FindingBody {
    /// `critical`, `high`, `medium`, `low` or `info`.
    #[schema(value_type = String)]
    pub severity: crate::scan::Severity,
    /// `configuration`, `isolation`, `vulnerability` or `audit`.
    pub category: String,
    /// What is wrong, or to be looked at.
    pub description: String,
    /// What to do about it.
    pub recommendation: String,
    /// Name of the machine, or `daemon`.
    pub affected_resource: String,
    /// Name of the check.
    #[schema(example = "ssh.root_login")]
    pub check: String,
    /// `failed` or `warning`.
    pub outcome: &'static str,
    /// What exactly.
    pub details: Vec<String>,
    /// Numbers of the controls that ask for it, by framework.
    pub controls: BTreeMap<String, Vec<String>>,
}

impl From<Scan> for ScanBody {
    fn from(scan: Scan) -> Self {
        Self {
            scan_id: scan.id.into(),
            status: scan.status.as_str(),
            status_reason: scan.reason,
            started_at: rfc3339(scan.started_at),
            estimated_completion: rfc3339(scan.estimated_completion),
            completed_at: scan.completed_at.map(rfc3339),
            scan_type: scan.kind.as_str(),
            target: scan.target,
            frameworks: scan.frameworks.into_iter().map(Framework::as_str).collect(),
            results: scan.results.map(Into::into),
        }
    }
}

impl From<Results> for ResultsBody {
    fn from(results: Results) -> Self {
        Self {
            total_checks: results.total_checks,
            passed: results.passed,
            failed: results.failed,
            warnings: results.warnings,
            not_applicable: results.not_applicable,
            risk_score: results.risk_score,
            findings: results.findings.into_iter().map(Into::into).collect(),
            findings_left_off: results.findings_left_off,
        }
    }
}

impl From<Finding> for FindingBody {
    fn from(finding: Finding) -> Self {
        let controls = finding.controls.into_iter();
        Self {
            severity: finding.severity,
            category: finding.category,
            description: finding.description,
            recommendation: finding.recommendation,
            affected_resource: finding.affected_resource,
            check: finding.check,
            outcome: match finding.is_failure {
                true => "failed",
                false => "warning",
            },
            details: finding.details,
            controls: controls
                .map(|(framework, numbers)| (framework.to_string(), numbers))
                .collect(),
        }
    }
}

impl AtVm for ScanError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::NotFound => ApiError::not_found(format!("Scan '{name}' not found")),
            Self::TooMany => ApiError::too_many(self.to_string(), None),
            Self::ShuttingDown => ApiError::unavailable(self.to_string()),
        }
    }
}

/// Start a security scan
///
/// It goes on after the answer; ask for its results by its id.
#[utoipa::path(
    post, path = "/api/v1/security/scan", operation_id = "startScan", tag = "security",
    request_body = ScanRequest,
    responses(
        (status = 202, description = "It is started", body = StartedBody),
        (status = 400, description = "The body is no JSON object", body = ErrorBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 422, description = "Fields are wrong; all of them are named", body = ErrorBody),
        (status = 429, description = "Too many scans are under way", body = ErrorBody),
        (status = 503, description = "The daemon is shutting down", body = ErrorBody),
    ),
)]
pub async fn start(
    State(state): State<AppState>,
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<StartedBody>), ApiError> {
    let spec = spec(body)?;
    let target = spec.target.clone().unwrap_or_default();
    let started = state
        .scans
        .start(&caller.manager, &caller.principal, spec)
        .await;
    let scan = started.map_err(|error| error.at_vm(&target))?;
    let body = StartedBody {
        scan_id: scan.id.into(),
        status: scan.status.as_str(),
        started_at: rfc3339(scan.started_at),
        estimated_completion: rfc3339(scan.estimated_completion),
    };
    Ok((StatusCode::ACCEPTED, Json(body)))
}

/// What is asked for, or all that is wrong with it.
fn spec(body: Result<Bytes, BytesRejection>) -> Result<ScanSpec, ApiError> {
    let mut fields = Fields::parse(body)?;
    let kind = fields.required("scan_type", Fields::string);
    let kind = kind.and_then(|word| {
        let kind = ScanKind::from_word(&word);
        if kind.is_none() {
            fields.wrong(
                "scan_type",
                "must be vulnerability, compliance or configuration",
            );
        }
        kind
    });
    let target = fields.required("target", Fields::string);
    if target.as_deref() == Some("") {
        fields.wrong("target", "must be the name or id of a VM, or all");
    }
    let words = fields.list("frameworks").unwrap_or_default();
    let mut frameworks = Vec::new();
    for word in words {
        match Framework::from_word(&word) {
            Some(framework) if frameworks.contains(&framework) => {}
            Some(framework) => frameworks.push(framework),
            None => fields.wrong(
                "frameworks",
                "must be of SOC2, HIPAA, PCI_DSS, GDPR, ISO27001 and NIST",
            ),
        }
    }
    let spec = kind.zip(target).map(|(kind, target)| ScanSpec {
        kind,
        target: (target != "all").then_some(target),
        frameworks,
    });
    fields.finish(spec)
}

/// Get the results of a security scan
///
/// For who has started it, and administrators.
#[utoipa::path(
    get, path = "/api/v1/security/scans/{scan_id}", operation_id = "getScan", tag = "security",
    params(("scan_id" = String, Path)),
    responses(
        (status = 200, description = "Where it stands, and what it came to", body = ScanBody),
        (status = 404, description = "No such scan", body = ErrorBody),
    ),
)]
pub async fn get(
    State(state): State<AppState>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<ScanBody>, ApiError> {
    let found = state.scans.get(&caller.principal, &id).await;
    let scan = found.map_err(|error| error.at_vm(&id))?;
    Ok(Json(scan.into()))
}
