//! What a sandbox has taken of its host in the last time.

use std::collections::HashMap;
use std::time::Duration;

use axum::Json;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::ApiError;
use super::extract::{Path, Query};
use crate::domain::{MeasureError, Point};
use crate::http::{Caller, ErrorBody};

/// The times that can be asked for, and what they are called, in seconds.
const RANGES: [(&str, u64); 7] = [
    ("5m", 300),
    ("10m", 600),
    ("1h", 3600),
    ("2h", 7200),
    ("6h", 21_600),
    ("12h", 43_200),
    ("24h", 86_400),
];
/// The one that is meant if none is given.
const DEFAULT_RANGE: &str = "10m";

/// What a sandbox has taken.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SandboxMetrics)]
pub struct MetricsBody {
    /// Which.
    pub sandbox_id: String,
    /// In which time: as it was asked for.
    #[schema(example = "10m")]
    pub range: &'static str,
    /// What was measured, oldest first. If it runs, the last is of now.
    pub points: Vec<PointBody>,
}

/// What was measured at one time.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MetricPoint)]
pub struct PointBody {
    /// When, in seconds since the Unix epoch.
    pub timestamp_unix: i64,
    /// Share of the time of all its vCPUs that it has had since the point before, 0 to 100.
    pub cpu_pct: f64,
    /// Memory of the host that its VMM occupied, in bytes. What it shares with others is in there.
    pub mem_bytes: u64,
    /// Space that its own disk took on the host's, in bytes.
    pub disk_bytes: u64,
}

impl From<Point> for PointBody {
    fn from(point: Point) -> Self {
        Self {
            timestamp_unix: point.at.as_second(),
            cpu_pct: (point.cpu_percent * 100.0).round() / 100.0,
            mem_bytes: point.memory_bytes,
            disk_bytes: point.disk_bytes,
        }
    }
}

impl From<MeasureError> for ApiError {
    fn from(error: MeasureError) -> Self {
        let text = error.to_string();
        match error {
            MeasureError::Lookup(source) => source.into(),
            MeasureError::NotRunning(_) => Self::state(text),
            MeasureError::Host(source) => Self::host(source),
        }
    }
}

/// Tell what a sandbox has taken
///
/// It is measured every five seconds, and kept in memory for a day: ten minutes as they were measured, two
/// hours as means of half a minute, the day as means of five minutes. That of a sandbox that is paused stays.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/metrics", operation_id = "sandboxMetrics", tag = "sandboxes",
    params(
        ("id" = String, Path, description = "Id or name of the sandbox"),
        ("range" = Option<String>, Query, description = "`5m`, `10m`, `1h`, `2h`, `6h`, `12h` or `24h`; `10m` if not given"),
    ),
    responses(
        (status = 200, description = "What was measured", body = MetricsBody),
        (status = 400, description = "There is no such range", body = ErrorBody),
        (status = 404, description = "There is no such sandbox", body = ErrorBody),
        (status = 409, description = "It neither runs nor is paused", body = ErrorBody),
        (status = 502, description = "It cannot be measured", body = ErrorBody),
    ),
)]
pub async fn get(
    caller: Caller,
    Path(id): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<MetricsBody>, ApiError> {
    let wanted = query.get("range").map_or(DEFAULT_RANGE, String::as_str);
    let found = RANGES.into_iter().find(|(name, _)| *name == wanted);
    let (range, seconds) = found.ok_or_else(|| {
        let names: Vec<_> = RANGES.into_iter().map(|(name, _)| name).collect();
        ApiError::invalid(format!("range must be one of {}", names.join(", ")))
    })?;
    let history = caller.manager.history(&id, Duration::from_secs(seconds));
    let (id, points) = history.await?;
    Ok(Json(MetricsBody {
        sandbox_id: id.into(),
        range,
        points: points.into_iter().map(Into::into).collect(),
    }))
}
