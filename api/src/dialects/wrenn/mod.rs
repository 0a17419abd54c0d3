//! `/v1/sandboxes`, also as `/v1/capsules`, `/v1/snapshots` and `/v1/templates`.

mod api_keys;
mod directories;
mod error;
mod exec;
mod exec_stream;
mod extract;
mod files;
mod logs;
mod metrics;
mod network;
mod ports;
mod processes;
mod pty;
mod sandboxes;
mod snapshots;
mod socket;
mod templates;
mod text;
mod usage;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{any, delete, get, post, put};
use utoipa::OpenApi;

pub use error::ApiError;
pub use ports::{by_header, by_host};

use crate::http::{AppState, ErrorBody};

#[derive(OpenApi)]
#[openapi(
    paths(
        sandboxes::create,
        sandboxes::list,
        usage::stats,
        usage::usage,
        sandboxes::get,
        sandboxes::destroy,
        sandboxes::ping,
        sandboxes::pause,
        sandboxes::resume,
        exec::exec,
        exec_stream::exec_stream,
        processes::list,
        processes::kill,
        processes::follow,
        pty::pty,
        ports::by_path,
        files::write,
        files::read,
        logs::get,
        metrics::get,
        directories::list,
        directories::make,
        directories::remove,
        snapshots::fork_sandbox,
        snapshots::create,
        snapshots::list,
        snapshots::get,
        snapshots::delete,
        snapshots::fork,
        network::get,
        network::set_egress,
        network::open_forward,
        network::close_forward,
        templates::build,
        templates::list,
        templates::get,
        templates::progress,
        templates::delete,
        api_keys::create,
        api_keys::list,
        api_keys::revoke,
    ),
    components(schemas(
        ErrorBody,
        sandboxes::CreateSandboxRequest,
        sandboxes::SandboxBody,
        sandboxes::TimingsBody,
        exec::ExecRequestBody,
        exec::ExecResponseBody,
        processes::BackgroundExecBody,
        processes::ProcessBody,
        processes::ProcessListBody,
        files::ReadFileRequestBody,
        metrics::MetricsBody,
        metrics::PointBody,
        usage::StatsBody,
        usage::CurrentBody,
        usage::PeaksBody,
        usage::SeriesBody,
        usage::UsageBody,
        usage::UsagePointBody,
        directories::ListDirRequestBody,
        directories::PathRequestBody,
        directories::ListDirBody,
        directories::MakeDirBody,
        snapshots::CreateSnapshotRequest,
        snapshots::SnapshotBody,
        snapshots::ListedBody,
        snapshots::BaseBody,
        snapshots::ForkRequest,
        snapshots::ForkBody,
        snapshots::ForkFailure,
        network::NetworkRequest,
        network::NetworkBody,
        network::EgressBody,
        network::AllowRuleBody,
        network::RateLimitsBody,
        network::ForwardRequest,
        network::ForwardBody,
        network::TrafficBody,
        network::CounterBody,
        network::DeniedBody,
        templates::BuildTemplateRequest,
        templates::RecipeBody,
        templates::StepBody,
        templates::OciBody,
        templates::ReadinessBody,
        templates::TemplateBody,
        templates::ProgressLine,
        api_keys::CreateKeyRequest,
        api_keys::KeyBody,
    ))
)]
struct Sandboxes;

/// What sandboxes are called in paths; clients know them by either word.
const NAMES: [&str; 2] = ["sandboxes", "capsules"];

/// The description of this dialect.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Sandboxes::openapi();
    let [name, other] = NAMES.map(|name| format!("/v1/{name}"));
    let paths = &mut document.paths.paths;
    let aliases: Vec<_> = paths
        .iter()
        .filter_map(|(path, item)| {
            let alias = format!("{other}{}", path.strip_prefix(&name)?);
            let mut item = item.clone();
            let operations = [
                &mut item.get,
                &mut item.post,
                &mut item.put,
                &mut item.delete,
            ];
            for operation in operations.into_iter().flatten() {
                let id = operation.operation_id.take();
                operation.operation_id = id.map(|id| format!("{id}ByOtherName"));
            }
            Some((alias, item))
        })
        .collect();
    paths.extend(aliases);
    document
}

/// The routes of this dialect.
pub fn router() -> Router<AppState> {
    let archive = post(templates::build).layer(DefaultBodyLimit::disable());
    let others = Router::new()
        .route(
            "/v1/snapshots",
            post(snapshots::create).get(snapshots::list),
        )
        .route(
            "/v1/snapshots/{id}",
            get(snapshots::get).delete(snapshots::delete),
        )
        .route("/v1/snapshots/{id}/fork", post(snapshots::fork))
        .route("/v1/api-keys", post(api_keys::create).get(api_keys::list))
        .route("/v1/api-keys/{id}", delete(api_keys::revoke))
        .route("/v1/templates", archive.get(templates::list))
        .route(
            "/v1/templates/{name}",
            get(templates::get).delete(templates::delete),
        )
        .route("/v1/templates/{name}/progress", get(templates::progress));
    NAMES.into_iter().fold(others, |router, name| {
        router.merge(sandboxes(&format!("/v1/{name}")))
    })
}

/// The routes of sandboxes below `base`.
fn sandboxes(base: &str) -> Router<AppState> {
    let upload = post(files::write).layer(DefaultBodyLimit::disable());
    let of_one = Router::new()
        .route("/exec", post(exec::exec))
        .route("/exec/stream", get(exec_stream::exec_stream))
        .route("/processes", get(processes::list))
        .route("/processes/{process}", delete(processes::kill))
        .route("/processes/{process}/stream", get(processes::follow))
        .route("/pty", get(pty::pty))
        .route("/ports/{port}", any(ports::by_path))
        .route("/ports/{port}/", any(ports::by_path))
        .route("/ports/{port}/{*path}", any(ports::by_path))
        .route("/ping", post(sandboxes::ping))
        .route("/pause", post(sandboxes::pause))
        .route("/resume", post(sandboxes::resume))
        .route("/fork", post(snapshots::fork_sandbox))
        .route("/files/write", upload.clone())
        .route("/files/stream/write", upload)
        .route("/files/read", post(files::read))
        .route("/files/stream/read", post(files::read))
        .route("/files/list", post(directories::list))
        .route("/files/mkdir", post(directories::make))
        .route("/files/remove", post(directories::remove))
        .route("/logs", get(logs::get))
        .route("/metrics", get(metrics::get))
        .route("/network", get(network::get))
        .route("/network/egress", put(network::set_egress))
        .route("/network/forwards", post(network::open_forward))
        .route(
            "/network/forwards/{transport}/{host}",
            delete(network::close_forward),
        );
    Router::new()
        .route(base, post(sandboxes::create).get(sandboxes::list))
        .route(&format!("{base}/stats"), get(usage::stats))
        .route(&format!("{base}/usage"), get(usage::usage))
        .route(
            &format!("{base}/{{id}}"),
            get(sandboxes::get).delete(sandboxes::destroy),
        )
        .nest(&format!("{base}/{{id}}"), of_one)
}
