//! The description of the API, and that it promises all that the API promises which it follows.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::Api;

const FOLLOWED: &str = conformance::wrenn::DOCUMENT;

/// Defaults that depend on the template here. A client that sends what the document says would
/// override the template.
const OF_THE_TEMPLATE: [&str; 2] = ["vcpus", "memory_mb"];

/// Which way what a schema describes goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// From the client: nothing more may be asked of it.
    Request,
    /// To the client: it must get what it may count on.
    Response,
}

/// Two documents, and what the second lacks.
struct Comparison {
    followed: Value,
    ours: Value,
    problems: Vec<String>,
}

/// What a reference leads to, or the value itself.
fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(path) => document.pointer(path.strip_prefix('#').unwrap()).unwrap(),
        None => value,
    }
}

/// Names of types, without `null`.
fn types(schema: &Value) -> Vec<&str> {
    let types = match &schema["type"] {
        Value::Array(types) => types.iter().filter_map(Value::as_str).collect(),
        other => Vec::from_iter(other.as_str()),
    };
    types.into_iter().filter(|kind| *kind != "null").collect()
}

/// Both ways of versions 3.0 and 3.1.
fn is_nullable(schema: &Value) -> bool {
    schema["nullable"] == true
        || schema["type"]
            .as_array()
            .is_some_and(|types| types.contains(&json!("null")))
}

fn strings(value: &Value) -> Vec<&str> {
    let all = value.as_array().into_iter().flatten();
    all.filter_map(Value::as_str).collect()
}

impl Comparison {
    fn of(followed: Value, ours: Value) -> Self {
        let mut comparison = Self {
            followed: followed.clone(),
            ours: ours.clone(),
            problems: Vec::new(),
        };
        for (path, item) in followed["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                if method == "parameters" {
                    continue;
                }
                let at = format!("{method} {path}");
                let ours = &ours["paths"][path][method];
                if ours.is_object() {
                    comparison.operation(&at, item, operation, ours);
                } else {
                    comparison.problems.push(format!("{at} is missing"));
                }
            }
        }
        for (name, schema) in followed["components"]["schemas"].as_object().unwrap() {
            let way = if name.ends_with("Request") {
                Way::Request
            } else {
                Way::Response
            };
            let ours = ours["components"]["schemas"][name].clone();
            comparison.schema(&format!("schema {name}"), way, schema, &ours);
        }
        comparison
    }

    fn expect(&mut self, is_so: bool, at: &str, what: &str) {
        if !is_so {
            self.problems.push(format!("{at}: {what}"));
        }
    }

    fn operation(&mut self, at: &str, item: &Value, theirs: &Value, ours: &Value) {
        let same = theirs["operationId"] == ours["operationId"];
        self.expect(same, at, "operationId differs");
        let of_path = item["parameters"].as_array().into_iter().flatten();
        let of_operation = theirs["parameters"].as_array().into_iter().flatten();
        let mut known = Vec::new();
        for parameter in of_path.chain(of_operation) {
            known.push(&parameter["name"]);
            let mut all = ours["parameters"].as_array().into_iter().flatten();
            let own = all.find(|own| {
                own["name"] == parameter["name"]
                    && own["in"] == parameter["in"]
                    && own["required"] == parameter["required"]
            });
            let Some(own) = own else {
                self.expect(false, at, &format!("no parameter {}", parameter["name"]));
                continue;
            };
            self.schema(at, Way::Request, &parameter["schema"], &own["schema"]);
        }
        for own in ours["parameters"].as_array().into_iter().flatten() {
            let asked = own["required"] != true || known.contains(&&own["name"]);
            self.expect(asked, at, &format!("{} is asked for", own["name"]));
        }
        if theirs["requestBody"].is_object() {
            let (theirs, ours) = (&theirs["requestBody"], &ours["requestBody"]);
            self.content(at, Way::Request, &theirs["content"], &ours["content"]);
        } else {
            let asked = ours["requestBody"]["required"] == true;
            self.expect(!asked, at, "a body is asked for");
        }
        for (status, response) in theirs["responses"].as_object().unwrap() {
            let at = format!("{at} {status}");
            let own = &ours["responses"][status];
            self.expect(own.is_object(), &at, "is missing");
            let has_body = own["content"].is_object();
            if response["content"].is_object() {
                self.content(&at, Way::Response, &response["content"], &own["content"]);
            } else {
                self.expect(!has_body, &at, "has a body");
            }
        }
    }

    fn content(&mut self, at: &str, way: Way, theirs: &Value, ours: &Value) {
        for (kind, media) in theirs.as_object().unwrap() {
            let own = &ours[kind];
            self.expect(own.is_object(), at, &format!("no {kind}"));
            self.schema(at, way, &media["schema"], &own["schema"]);
        }
    }

    fn schema(&mut self, at: &str, way: Way, theirs: &Value, ours: &Value) {
        let theirs = resolve(&self.followed, theirs).clone();
        let ours = resolve(&self.ours, ours).clone();
        self.expect(ours.is_object(), at, "no schema");
        self.expect(types(&theirs) == types(&ours), at, "type differs");
        if is_nullable(&theirs) || way == Way::Response {
            let same = is_nullable(&theirs) == is_nullable(&ours);
            self.expect(same, at, "whether it may be null differs");
        }
        for field in ["format", "default"] {
            let by_template = field == "default"
                && OF_THE_TEMPLATE
                    .iter()
                    .any(|name| at.ends_with(&format!(".{name}")));
            let same = theirs[field].is_null() || theirs[field] == ours[field];
            self.expect(same || by_template, at, &format!("{field} differs"));
        }
        let (mut their_words, mut our_words) = (strings(&theirs["enum"]), strings(&ours["enum"]));
        their_words.sort_unstable();
        our_words.sort_unstable();
        self.expect(their_words == our_words, at, "enum differs");
        let (their_required, our_required) =
            (strings(&theirs["required"]), strings(&ours["required"]));
        let (asked, promised) = match way {
            Way::Request => (our_required, their_required),
            Way::Response => (their_required, our_required),
        };
        for name in asked {
            let is_in = promised.contains(&name);
            self.expect(is_in, at, &format!("required differs in {name}"));
        }
        if theirs["items"].is_object() {
            self.schema(&format!("{at}[]"), way, &theirs["items"], &ours["items"]);
        }
        for (name, schema) in theirs["properties"].as_object().into_iter().flatten() {
            let own = &ours["properties"][name];
            let at = format!("{at}.{name}");
            if own.is_object() {
                self.schema(&at, way, schema, own);
            } else {
                self.problems.push(format!("{at} is missing"));
            }
        }
    }
}

fn documents() -> (Value, Value) {
    let followed = serde_json::from_str(FOLLOWED).unwrap();
    (
        followed,
        serde_json::to_value(api::http::document()).unwrap(),
    )
}

#[test]
fn the_description_is_a_superset_of_the_one_that_it_follows() {
    let (followed, ours) = documents();
    let operations = followed["paths"].as_object().unwrap().values();
    let operations = operations.flat_map(|item| item.as_object().unwrap().keys());
    assert_eq!(operations.filter(|key| *key != "parameters").count(), 9);
    let problems = Comparison::of(followed, ours).problems;
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn each_kind_of_difference_is_found() {
    let changes = [
        ("/paths/~1v1~1sandboxes/get", Value::Null, "is missing"),
        (
            "/paths/~1v1~1sandboxes/get/operationId",
            json!("list"),
            "operationId",
        ),
        (
            "/paths/~1v1~1sandboxes~1{id}/get/parameters",
            json!([]),
            "no parameter",
        ),
        (
            "/paths/~1v1~1sandboxes/get/parameters",
            json!([{"name": "team", "in": "query", "required": true}]),
            "\"team\" is asked for",
        ),
        (
            "/paths/~1v1~1sandboxes~1{id}~1pause/post/requestBody",
            json!({"required": true}),
            "a body is asked for",
        ),
        (
            "/paths/~1v1~1sandboxes/post/responses/502",
            Value::Null,
            "502: is missing",
        ),
        (
            "/paths/~1v1~1sandboxes~1{id}/delete/responses/204/content",
            json!({}),
            "has a body",
        ),
        (
            "/paths/~1v1~1sandboxes~1{id}~1files~1write/post/requestBody/content",
            json!({"application/json": {}}),
            "no multipart/form-data",
        ),
        (
            "/components/schemas/Sandbox/properties/host_ip",
            Value::Null,
            "host_ip is missing",
        ),
        (
            "/components/schemas/Sandbox/properties/vcpus/type",
            json!("string"),
            "type differs",
        ),
        (
            "/components/schemas/Sandbox/properties/started_at/type",
            json!("string"),
            "may be null differs",
        ),
        (
            "/components/schemas/Sandbox/properties/created_at/format",
            json!("date"),
            "format",
        ),
        (
            "/components/schemas/ExecRequest/properties/timeout_sec/default",
            json!(31),
            "default differs",
        ),
        (
            "/components/schemas/SandboxStatus/enum",
            json!(["running"]),
            "enum differs",
        ),
        (
            "/components/schemas/CreateSandboxRequest/required",
            json!(["template"]),
            "required differs in template",
        ),
    ];
    for (pointer, value, expected) in changes {
        let (followed, mut ours) = documents();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        ours.pointer_mut(parent).unwrap()[name] = value;
        let problems = Comparison::of(followed, ours).problems;
        let is_found = problems.iter().any(|problem| problem.contains(expected));
        assert!(is_found, "{pointer}: {problems:?}");
    }
}

#[tokio::test]
async fn both_forms_are_served_and_say_the_same() {
    let api = Api::new(1, 1).await;
    let (status, json) = api.call("GET", "/openapi.json", "").await;
    assert_eq!((status.as_u16(), &json["openapi"]), (200, &json!("3.1.0")));
    assert_eq!(json, documents().1);
    let response = api.send("GET", "/openapi.yaml", "").await;
    assert_eq!(response.headers()["content-type"], "application/yaml");
    let page = api.send("GET", "/docs/", "").await;
    assert_eq!(page.status().as_u16(), 200);
    let policy = page.headers()["content-security-policy"].to_str().unwrap();
    assert!(
        policy.starts_with("default-src 'none'; script-src 'self'; "),
        "{policy}"
    );
    let outside = policy
        .split(' ')
        .any(|word| word.contains("//") || word == "*");
    assert!(!outside, "{policy}");
    for (header, expected) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
    ] {
        assert_eq!(page.headers()[header], expected);
        assert_eq!(response.headers()[header], expected);
    }
    let stranger = axum::http::Request::get("/docs/").header("host", "evil.example");
    let stranger = stranger.body(axum::body::Body::empty()).unwrap();
    let refused = tower::ServiceExt::oneshot(api.router.clone(), stranger).await;
    assert_eq!(refused.unwrap().status().as_u16(), 403);
}

/// Fields that a schema leads to, each with the names of what it is in before it: `cpu.vcpus`. What has
/// fields of its own is none itself.
fn fields(document: &Value, schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    let schema = resolve(document, schema);
    let parts = ["allOf", "oneOf", "anyOf"].map(|kind| schema[kind].as_array());
    let is_null = |part: &Value| part["type"] == "null";
    let mut parts: Vec<_> = parts.into_iter().flatten().flatten().collect();
    parts.retain(|part| !is_null(part));
    parts.extend(Some(&schema["items"]).filter(|items| items.is_object()));
    for part in &parts {
        fields(document, part, at, found);
    }
    let own = schema["properties"].as_object();
    for (name, schema) in own.into_iter().flatten() {
        let at = match at {
            "" => name.clone(),
            at => format!("{at}.{name}"),
        };
        fields(document, schema, &at, found);
    }
    if own.is_none() && parts.is_empty() && !at.is_empty() {
        found.insert(at.to_owned());
    }
}

/// The names in the first column of the tables that tell where values come from.
fn told(page: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut is_told = false;
    for line in page.lines() {
        let mut cells = line.split(" | ");
        let Some(first) = cells.next().and_then(|cell| cell.strip_prefix("| ")) else {
            is_told &= line.starts_with('|');
            continue;
        };
        let second = cells.next().unwrap_or_default();
        is_told |= second.starts_with("Source") || second.starts_with("where it comes from");
        if is_told {
            names.extend(first.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    names
}

/// Whether one of these names is this field, with or without what it is in; one that ends in `…` is all that
/// begin so.
fn tells(names: &BTreeSet<String>, field: &str) -> bool {
    let inner = field.match_indices('.').map(|(dot, _)| &field[dot + 1..]);
    std::iter::once(field).chain(inner).any(|field| {
        names.iter().any(|name| match name.strip_suffix('…') {
            Some(beginning) => field.starts_with(beginning),
            None => name == field,
        })
    })
}

#[test]
fn the_pages_tell_where_each_field_of_each_answer_comes_from() {
    let document = documents().1;
    let names: BTreeSet<_> = [
        include_str!("../../docs/api.md"),
        include_str!("../../docs/microvm-api.md"),
    ]
    .into_iter()
    .flat_map(told)
    .collect();
    let mut problems = Vec::new();
    let (mut operations, mut all) = (0, BTreeSet::new());
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if !path.starts_with("/api/v1/") || method == "parameters" {
                continue;
            }
            operations += 1;
            for (status, response) in operation["responses"].as_object().unwrap() {
                let mut found = BTreeSet::new();
                let content = response["content"].as_object().into_iter().flatten();
                for (_, media) in content {
                    fields(&document, &media["schema"], "", &mut found);
                }
                let untold = found.iter().filter(|field| !tells(&names, field));
                problems.extend(untold.map(|field| format!("{method} {path} {status}: {field}")));
                all.append(&mut found);
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(
        operations >= 30 && all.len() >= 100,
        "{operations}, {all:?}"
    );
    assert!(!tells(&names, "no_such_field"));
    assert!(tells(&names, "host.memory_total_gb") && tells(&names, "vms.status"));
}
