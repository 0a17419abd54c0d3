//! What all sandboxes of whoever asks have now, and had before.

use axum::Json;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ApiError;
use super::extract::Query;
use super::sandboxes::rfc3339;
use crate::domain::{DayUsage, KEPT_DAYS, Reserved, Runs, start_of};
use crate::http::{Caller, ErrorBody};

/// The times that can be asked for, and what they are called, in seconds.
const RANGES: [(&str, i64); 5] = [
    ("5m", 300),
    ("1h", 3600),
    ("6h", 21_600),
    ("24h", 86_400),
    ("30d", 30 * 86_400),
];
/// The one that is meant if none is given.
const DEFAULT_RANGE: &str = "1h";
/// In how many parts a range is told.
const PARTS: i64 = 60;
/// The time that peaks are of, in seconds.
const PEAKS: i64 = 30 * 86_400;
/// How many days before today usage is told from, if that is not given.
const DEFAULT_DAYS: i64 = 30;

/// What sandboxes have and had.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SandboxStats)]
pub struct StatsBody {
    /// The time that `series` is of: as it was asked for.
    #[schema(example = "1h")]
    pub range: &'static str,
    /// Of those that run.
    pub current: CurrentBody,
    /// The most of each at any time in the last 30 days.
    pub peaks: PeaksBody,
    /// At times that are equally far apart, up to now.
    pub series: SeriesBody,
}

/// What sandboxes that run have.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsCurrent)]
pub struct CurrentBody {
    /// How many there are.
    pub running_count: u64,
    /// Their vCPUs.
    pub vcpus_reserved: u64,
    /// Their memory in MiB.
    pub memory_mb_reserved: u64,
}

/// The most that sandboxes had.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsPeaks)]
pub struct PeaksBody {
    /// How many ran at a time.
    pub running_count: u64,
    /// vCPUs of those that ran at a time.
    pub vcpus: u64,
    /// Memory of those that ran at a time, in MiB.
    pub memory_mb: u64,
}

/// What sandboxes had at some times.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = StatsSeries)]
pub struct SeriesBody {
    /// The times.
    pub labels: Vec<String>,
    /// How many ran at each.
    pub running: Vec<u64>,
    /// Their vCPUs.
    pub vcpus: Vec<u64>,
    /// Their memory in MiB.
    pub memory_mb: Vec<u64>,
}

impl StatsBody {
    fn of(runs: &Runs, (range, seconds): (&'static str, i64), now: Timestamp) -> Self {
        let ago = |seconds: i64| before(now, seconds);
        let parts = (0..=PARTS).rev();
        let times: Vec<_> = parts.map(|part| ago(seconds * part / PARTS)).collect();
        let at = runs.at(&times);
        let current = at.last().copied().unwrap_or_default();
        let peaks = runs.peaks(ago(PEAKS));
        let each = |part: fn(&Reserved) -> u64| at.iter().map(part).collect();
        Self {
            range,
            current: CurrentBody {
                running_count: current.running,
                vcpus_reserved: current.vcpus,
                memory_mb_reserved: current.memory_mb,
            },
            peaks: PeaksBody {
                running_count: peaks.running,
                vcpus: peaks.vcpus,
                memory_mb: peaks.memory_mb,
            },
            series: SeriesBody {
                labels: times.into_iter().map(rfc3339).collect(),
                running: each(|reserved| reserved.running),
                vcpus: each(|reserved| reserved.vcpus),
                memory_mb: each(|reserved| reserved.memory_mb),
            },
        }
    }
}

/// So many seconds before.
fn before(now: Timestamp, seconds: i64) -> Timestamp {
    let ago = now.checked_sub(Span::new().seconds(seconds));
    ago.unwrap_or(Timestamp::MIN)
}

#[derive(Debug, Deserialize)]
pub struct StatsParams {
    range: Option<String>,
}

/// Tell what sandboxes have and had
///
/// Of all sandboxes of whoever asks, those included that were deleted since: how many run, and the vCPUs and
/// memory that they have; the most of each in the last 30 days; and what it was at 61 times, up to now, that
/// divide the range.
#[utoipa::path(
    get, path = "/v1/sandboxes/stats", operation_id = "sandboxStats", tag = "sandboxes",
    params(("range" = Option<String>, Query,
        description = "`5m`, `1h`, `6h`, `24h` or `30d`; `1h` if not given")),
    responses(
        (status = 200, description = "What they have and had", body = StatsBody),
        (status = 400, description = "There is no such range", body = ErrorBody),
    ),
)]
pub async fn stats(
    caller: Caller,
    Query(params): Query<StatsParams>,
) -> Result<Json<StatsBody>, ApiError> {
    let wanted = params.range.as_deref().unwrap_or(DEFAULT_RANGE);
    let range = RANGES.into_iter().find(|(name, _)| *name == wanted);
    let range = range.ok_or_else(|| {
        let names = RANGES.map(|(name, _)| name).join(", ");
        ApiError::invalid(format!("range must be one of {names}"))
    })?;
    let runs = caller.manager.runs(before(Timestamp::now(), PEAKS)).await?;
    Ok(Json(StatsBody::of(&runs, range, Timestamp::now())))
}

/// What sandboxes had on some days.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = SandboxUsage)]
pub struct UsageBody {
    /// The first day, in UTC.
    #[schema(format = Date, example = "2026-01-01")]
    pub from: String,
    /// The last day.
    #[schema(format = Date, example = "2026-01-31")]
    pub to: String,
    /// What they had on each of them.
    pub points: Vec<UsagePointBody>,
}

/// What sandboxes had on a day.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = UsagePoint)]
pub struct UsagePointBody {
    /// Which, in UTC.
    #[schema(format = Date, example = "2026-01-31")]
    pub date: String,
    /// Minutes that they ran, each times its vCPUs.
    pub cpu_minutes: f64,
    /// Minutes that they ran, each times its memory in MiB.
    pub ram_mb_minutes: f64,
}

impl From<DayUsage> for UsagePointBody {
    fn from(usage: DayUsage) -> Self {
        let rounded = |minutes: f64| (minutes * 10_000.0).round() / 10_000.0;
        Self {
            date: usage.date.to_string(),
            cpu_minutes: rounded(usage.vcpu_minutes),
            ram_mb_minutes: rounded(usage.memory_mb_minutes),
        }
    }
}

#[derive(Debug, Deserialize)]
pub struct UsageParams {
    from: Option<String>,
    to: Option<String>,
}

impl UsageParams {
    /// The first and the last day that are meant.
    fn days(&self, today: Date) -> Result<(Date, Date), ApiError> {
        let day = |name: &str, given: Option<&str>, default: Date| match given {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| {
                ApiError::invalid(format!("{name} must be a day as {today}, not {text:?}"))
            }),
        };
        let ago = |date: Date, days: i64| date.saturating_sub(Span::new().days(days));
        let to = day("to", self.to.as_deref(), today)?;
        let from = day(
            "from",
            self.from.as_deref(),
            ago(to.min(today), DEFAULT_DAYS),
        )?;
        let oldest = ago(today, KEPT_DAYS);
        // Where it is later than here, tomorrow has begun.
        let latest = today.saturating_add(Span::new().days(1));
        if from < oldest || to > latest || from > to {
            return Err(ApiError::invalid(format!(
                "from and to must be days in that order from {oldest} to {latest}"
            )));
        }
        Ok((from, to))
    }
}

/// Tell what sandboxes had on each day
///
/// Of all sandboxes of whoever asks, those included that were deleted since: the minutes that they ran, times
/// the vCPUs and the memory that they had. Time in which they were paused or off does not count. Days are
/// those of UTC, and known for 366 days.
#[utoipa::path(
    get, path = "/v1/sandboxes/usage", operation_id = "sandboxUsage", tag = "sandboxes",
    params(
        ("from" = Option<String>, Query,
            description = "The first day, `YYYY-MM-DD`; 30 days before the last if not given"),
        ("to" = Option<String>, Query, description = "The last day; today if not given"),
    ),
    responses(
        (status = 200, description = "What they had", body = UsageBody),
        (status = 400, description = "There are no such days", body = ErrorBody),
    ),
)]
pub async fn usage(
    caller: Caller,
    Query(params): Query<UsageParams>,
) -> Result<Json<UsageBody>, ApiError> {
    let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let (from, to) = params.days(today)?;
    let runs = caller.manager.runs(start_of(from)).await?;
    let days = runs.by_day(from, to, Timestamp::now());
    Ok(Json(UsageBody {
        from: from.to_string(),
        to: to.to_string(),
        points: days.into_iter().map(Into::into).collect(),
    }))
}

#[cfg(test)]
mod tests {
    use jiff::civil::date;

    use super::*;

    #[test]
    fn days_have_defaults_and_bounds() {
        let today = date(2026, 3, 10);
        let days = |from: Option<&str>, to: Option<&str>| {
            let [from, to] = [from, to].map(|day| day.map(str::to_owned));
            UsageParams { from, to }.days(today).ok()
        };
        assert_eq!(days(None, None), Some((date(2026, 2, 8), today)));
        assert_eq!(
            days(Some("2026-03-09"), Some("2026-03-11")),
            Some((date(2026, 3, 9), date(2026, 3, 11)))
        );
        assert_eq!(
            days(Some("2025-03-09"), None),
            Some((date(2025, 3, 9), today))
        );
        for (from, to) in [
            (Some("2025-03-08"), None),
            (None, Some("2026-03-12")),
            (Some("2026-03-09"), Some("2026-03-08")),
            (Some("yesterday"), None),
            (Some("2026-02-30"), None),
            (None, Some("")),
        ] {
            assert_eq!(days(from, to), None, "{from:?} {to:?}");
        }
    }
}
