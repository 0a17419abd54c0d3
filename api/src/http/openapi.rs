//! The description of the API, made from the code that serves it.

use utoipa::OpenApi;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{ContentBuilder, PathItem, Ref, RefOr, Response, ResponseBuilder};

use super::auth::{OPEN, is_microvm};
use super::{ErrorBody, HealthBody};
use crate::dialects::{microvm, wrenn};

/// What any operation may answer, as all that comes before a handler is the same for all.
const ANY: [(&str, &str); 4] = [
    ("400", "The request makes no sense"),
    ("401", "No credentials, or not good ones"),
    ("403", "The caller may not do that, or a web page asks"),
    ("500", "The daemon failed; its log says why"),
];
/// What those that take a body may answer besides.
const WITH_BODY: [(&str, &str); 2] = [
    ("408", "The body came too slowly"),
    ("413", "The body is too large"),
];
/// What those of `/api/v1` may answer besides.
const OF_MICROVM: [(&str, &str); 1] = [("429", "Too many requests")];
/// What those of `/api/v1` that take a body may answer besides.
const OF_MICROVM_WITH_BODY: [(&str, &str); 1] = [(
    "422",
    "Fields of the body make no sense: all of them are told at once",
)];

/// The description cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("the API's description cannot be written: {0}")]
pub struct OpenApiError(String);

/// What the document calls a key, in the header `X-API-Key`.
const KEY: &str = "apiKey";
/// What the document calls a token, in the header `Authorization`.
const TOKEN: &str = "bearer";

#[derive(OpenApi)]
#[openapi(
    info(
        title = "MicroVM Sandbox API",
        description = "Runs each untrusted program in a virtual machine of its own.",
    ),
    servers(
        (url = "/", description = "Where this is from"),
        (url = "http://localhost:8080", description = "This machine"),
        (url = "http://localhost:8000", description = "This machine"),
    ),
    paths(super::health, super::metrics::metrics),
    components(schemas(HealthBody, ErrorBody)),
)]
struct Service;

/// The description, OpenAPI 3.1.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Service::openapi();
    document.merge(wrenn::document());
    document.merge(microvm::document());
    let key = ApiKey::Header(ApiKeyValue::new("X-API-Key"));
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(KEY, SecurityScheme::ApiKey(key));
    components.add_security_scheme(TOKEN, SecurityScheme::Http(bearer.build()));
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            add_common(path, operation);
        }
    }
    document
}

/// The operations of a path.
fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.delete,
        &mut item.patch,
    ]
    .into_iter()
    .flatten()
}

/// Adds who may call an operation, and the errors that it has in common with all others.
fn add_common(path: &str, operation: &mut Operation) {
    let is_microvm = is_microvm(path);
    let has_body = operation.request_body.is_some();
    let schema = if is_microvm { "MicrovmError" } else { "Error" };
    let common = [
        (true, &ANY[..]),
        (has_body, &WITH_BODY),
        (is_microvm, &OF_MICROVM),
        (is_microvm && has_body, &OF_MICROVM_WITH_BODY),
    ];
    let common = common.into_iter().filter(|(applies, _)| *applies);
    let responses = &mut operation.responses.responses;
    for (status, description) in common.flat_map(|(_, responses)| responses) {
        // What an operation says itself is more precise.
        let response = || RefOr::T(error(schema, description));
        responses
            .entry((*status).to_owned())
            .or_insert_with(response);
    }
    let one_of = |name: &str| SecurityRequirement::new(name, [""; 0]);
    let mut security = vec![one_of(TOKEN), one_of(KEY)];
    if OPEN.contains(&path) {
        security.clear();
    } else if !is_microvm {
        // Whether they are needed is the daemon's settings' to say.
        security.push(SecurityRequirement::default());
    }
    operation.security = Some(security);
}

/// The response that is an error of this schema.
fn error(schema: &str, description: &str) -> Response {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(schema)));
    ResponseBuilder::new()
        .description(description)
        .content("application/json", body.build())
        .build()
}

/// The description as YAML.
///
/// # Errors
/// It cannot be written.
pub fn yaml() -> Result<String, OpenApiError> {
    document()
        .to_yaml()
        .map_err(|error| OpenApiError(error.to_string()))
}

/// The description as JSON.
///
/// # Errors
/// It cannot be written.
pub fn json() -> Result<String, OpenApiError> {
    document()
        .to_pretty_json()
        .map_err(|error| OpenApiError(error.to_string()))
}
