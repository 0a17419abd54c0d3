//! The audit log.

use axum::Json;
use axum::extract::State;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::extract::Query;
use super::rfc3339;
use crate::audit::{Entry, Filter, MAX_LIMIT};
use crate::http::{AppState, Caller};

/// Which records.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// Not before this time (ISO 8601, with a zone).
    start_time: Option<String>,
    /// Not after this time; one without a fraction is all of its second.
    end_time: Option<String>,
    /// Only of this action, as in `vm_create`.
    action_type: Option<String>,
    /// Only of this kind of thing, as in `vm`.
    resource_type: Option<String>,
    /// Only by this user; `local` is whoever is on this machine, `anonymous` nobody known.
    user_id: Option<String>,
    /// How many at most, 1 to 1000. 100 if not given.
    limit: Option<String>,
    /// Leave out so many of the latest. None if not given.
    offset: Option<String>,
}

/// Records, latest first.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmAuditLogs)]
pub struct AuditLogsBody {
    /// The latest.
    pub logs: Vec<AuditLogBody>,
    /// How many there are in all of this filter.
    pub total: u64,
    /// How many were asked for.
    pub limit: u32,
    /// How many were left out.
    pub offset: u64,
}

/// A record.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmAuditLog)]
pub struct AuditLogBody {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub timestamp: String,
    /// What.
    #[schema(example = "vm_create")]
    pub action_type: String,
    /// To what kind of thing.
    #[schema(example = "vm")]
    pub resource_type: String,
    /// To which.
    pub resource_id: Option<String>,
    /// By whom.
    pub user_id: String,
    /// From where.
    pub source_ip: Option<String>,
    /// `success`, `denied` or `failure`; `unanswered` if there was no answer, and it may have been done.
    pub outcome: String,
    /// More of it.
    #[schema(value_type = Object)]
    pub details: Value,
    /// For which frameworks it counts.
    pub compliance_frameworks: Vec<String>,
}

impl From<Entry> for AuditLogBody {
    fn from(entry: Entry) -> Self {
        Self {
            timestamp: rfc3339(entry.time),
            action_type: entry.action_type,
            resource_type: entry.resource_type,
            resource_id: entry.resource_id,
            user_id: entry.user_id,
            source_ip: entry.source_ip,
            outcome: entry.outcome,
            details: entry.details,
            compliance_frameworks: entry.frameworks,
        }
    }
}

/// Read the audit log
///
/// For administrators. Latest first.
#[utoipa::path(
    get, path = "/api/v1/security/audit-logs", operation_id = "auditLogs", tag = "security",
    params(AuditQuery),
    responses(
        (status = 200, description = "Records", body = AuditLogsBody),
        (status = 400, description = "A parameter makes no sense", body = ErrorBody),
        (status = 401, description = "No credentials", body = ErrorBody),
        (status = 403, description = "Not an administrator", body = ErrorBody),
    ),
)]
pub async fn logs(
    State(state): State<AppState>,
    caller: Caller,
    Query(query): Query<AuditQuery>,
) -> Result<Json<AuditLogsBody>, ApiError> {
    if !caller.principal.is_admin() {
        return Err(ApiError::forbidden("Insufficient permissions"));
    }
    let limit = match query.limit.as_deref().map(str::parse) {
        None => 100,
        Some(Ok(limit)) if (1..=MAX_LIMIT).contains(&limit) => limit,
        Some(_) => {
            let issue = format!("must be between 1 and {MAX_LIMIT}");
            return Err(ApiError::bad_parameter("limit", issue));
        }
    };
    let time = |field: &str, text: Option<String>| match text.map(|text| text.parse::<Timestamp>())
    {
        None => Ok(None),
        Some(Ok(time)) => Ok(Some(time)),
        Some(Err(_)) => Err(ApiError::bad_parameter(
            field,
            "must be a time such as 2025-10-01T12:00:00Z",
        )),
    };
    let offset = match query.offset.as_deref().map(str::parse) {
        None => 0,
        Some(Ok(offset)) => offset,
        Some(Err(_)) => return Err(ApiError::bad_parameter("offset", "must be 0 or more")),
    };
    let filter = Filter {
        start: time("start_time", query.start_time)?,
        end: time("end_time", query.end_time)?.map(end_of_second),
        action_type: query.action_type,
        resource_type: query.resource_type,
        user_id: query.user_id,
        limit,
        offset,
    };
    let listed = state.audit.list(filter).await;
    let (logs, total) = listed.map_err(|error| ApiError::internal(&error))?;
    Ok(Json(AuditLogsBody {
        logs: logs.into_iter().map(Into::into).collect(),
        total,
        limit,
        offset,
    }))
}

/// The last moment of a second, so that a time as records tell it has all of that second; a time with a
/// fraction is what it is.
fn end_of_second(time: Timestamp) -> Timestamp {
    match time.subsec_nanosecond() {
        0 => time + SignedDuration::from_micros(999_999),
        _ => time,
    }
}
