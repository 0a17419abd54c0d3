//! `/api/v1`: every example of the reference of the API that it follows. Each example of a request is
//! sent, with values in place of the words that stand for one, and each example of an answer is compared
//! with the answer, field by field, by name and type.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket};

use crate::{Answer, Client, FORM, form};

const REFERENCE: &str = include_str!("microvm.json");

/// How long nothing may happen.
const PATIENCE: Duration = Duration::from_secs(300);

const RESIZE: &str = "PUT /vms/{vm_name}/resources";
const PASSWORD: &str = "Correct-horse-7";

/// What differs from one daemon under test to another. It has no users and no machines yet.
pub struct Place<'a> {
    /// Path of a directory in machines whose files can be written.
    pub directory: &'a str,
    /// Whether the host has a network. Without one, neither its examples nor its fields are tried.
    pub has_network: bool,
    /// Whether machines have guests that take and give up vCPUs and memory. Otherwise that is not tried.
    pub has_guests: bool,
}

/// Whether an error is as the reference has it.
///
/// # Errors
/// It is not; what is wrong.
pub fn is_error_like(status: u16, error: &Value) -> Result<(), String> {
    let reference: Value = serde_json::from_str(REFERENCE).unwrap();
    let example = &reference["errors"][status.to_string()];
    assert!(example.is_object(), "the reference has no {status}");
    let mut problems = Vec::new();
    compare(error, example, "", &mut problems);
    if error["error"] != example["error"] {
        problems.push(format!("error is not {}", example["error"]));
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(problems.join(", ")),
    }
}

/// Notes in which fields `value` is not like `example`: in missing ones, in types, in what is no time
/// where the example has one, and in what is not among the words that the example allows.
fn compare(value: &Value, example: &Value, at: &str, problems: &mut Vec<String>) {
    let mut wrong = |what: &str| problems.push(format!("{at} {what}"));
    match (value, example) {
        (Value::Object(value), Value::Object(example)) => {
            for (name, example) in example {
                let at = match at {
                    "" => name.clone(),
                    at => format!("{at}.{name}"),
                };
                match value.get(name) {
                    Some(value) => compare(value, example, &at, problems),
                    None => problems.push(format!("{at} is missing")),
                }
            }
        }
        (Value::Array(values), Value::Array(examples)) => {
            if values.is_empty() {
                wrong("is empty");
            }
            for value in values {
                compare(value, &examples[0], &format!("{at}[]"), problems);
            }
        }
        (Value::String(value), Value::String(example)) => {
            let is_time = example.parse::<jiff::Timestamp>().is_ok();
            if is_time && value.parse::<jiff::Timestamp>().is_err() {
                wrong("is no time");
            }
            if example.contains('|') && example.split('|').all(|word| word != value) {
                wrong(&format!("is {value} and none of {example}"));
            }
        }
        (Value::Number(value), Value::Number(example)) => {
            // What is measured may have a fraction, whatever the example has.
            let is_measured = ["_gb", "_percent", "_seconds", "_ms"]
                .iter()
                .any(|unit| at.ends_with(unit));
            if example.is_u64() && !value.is_u64() && !is_measured {
                wrong("is no count");
            }
        }
        (Value::Bool(_), Value::Bool(_)) => {}
        // There is no Python in the daemon.
        (Value::Null, _) if at == "system.python_version" => {}
        (value, example) => wrong(&format!("is {value}, and not like {example}")),
    }
}

/// Whether this stands for a value in an example of a request.
fn is_placeholder(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|word| word == "string" || word.contains('|') || word.starts_with("/path/to/"))
}

/// Puts values in place of the words that stand for one.
fn fill(request: &mut Map<String, Value>, values: &Value) {
    for (name, value) in values.as_object().into_iter().flatten() {
        let at = request.get(name).unwrap_or(&Value::Null);
        let stands_for_one = match at {
            Value::Array(words) => value
                .as_array()
                .is_some_and(|values| values.iter().all(|value| words.contains(value))),
            word => is_placeholder(word),
        };
        assert!(stands_for_one, "the example says {at} for {name}");
        request.insert(name.clone(), value.clone());
    }
    let unfilled: Vec<_> = request
        .values()
        .filter(|value| is_placeholder(value))
        .collect();
    assert!(unfilled.is_empty(), "{unfilled:?}");
}

/// The examples, those that were tried, and what was wrong with the answers.
struct Examples<'a> {
    reference: Value,
    client: &'a dyn Client,
    place: &'a Place<'a>,
    bearer: String,
    tried: BTreeSet<String>,
    problems: Vec<String>,
}

impl Examples<'_> {
    fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
        let path = format!("/api/v1{path}");
        let mut headers = vec![("Content-Type", kind)];
        if !self.bearer.is_empty() {
            headers.push(("Authorization", self.bearer.as_str()));
        }
        self.client.send(method, &path, &headers, body)
    }

    fn example(&self, call: &str) -> Value {
        let all = self.reference["examples"].as_array().unwrap().iter();
        let mut found = all.filter(|example| example["call"] == call);
        let example = found.next();
        example
            .unwrap_or_else(|| panic!("no example of {call}"))
            .clone()
    }

    /// The JSON of the answer to the example of a call whose request has these values.
    fn call(&mut self, call: &str, names: &[&str], values: &Value) -> Value {
        self.call_with(call, names, "", values)
    }

    /// The same, with this query.
    fn call_with(&mut self, call: &str, names: &[&str], query: &str, values: &Value) -> Value {
        let mut example = self.example(call);
        let body = match example["request"].as_object_mut() {
            Some(request) => {
                fill(request, values);
                if !self.place.has_network {
                    request.remove("network_config");
                }
                Value::Object(request.clone()).to_string()
            }
            None => String::new(),
        };
        let (method, path) = path_of(call, names);
        let answer = self.send(
            &method,
            &(path + query),
            "application/json",
            body.as_bytes(),
        );
        self.check(call, &answer);
        answer.json()
    }

    fn check(&mut self, call: &str, answer: &Answer) {
        let mut example = self.example(call);
        self.tried.insert(call.to_owned());
        let mut problems = Vec::new();
        if !self.place.has_network {
            forget(&mut example["response"], "network_config");
            if call.ends_with("/metrics") {
                forget(&mut example["response"], "network");
            }
        }
        if example["status"] == answer.status {
            match &example["response"] {
                Value::Null => {}
                response => {
                    compare(&answer.json(), response, "", &mut problems);
                    let (own, said) = (&answer.json()["message"], &response["message"]);
                    if own != said {
                        problems.push(format!("message is {own}, and not {said}"));
                    }
                }
            }
        } else {
            let text = String::from_utf8_lossy(&answer.body);
            problems.push(format!("has status {}: {text}", answer.status));
        }
        let problems = problems.iter().map(|problem| format!("{call}: {problem}"));
        self.problems.extend(problems);
    }

    /// A request whose answer is to be the example of an error.
    fn error(&mut self, status: u16, method: &str, path: &str, body: &Value) -> Value {
        let answer = self.send(
            method,
            path,
            "application/json",
            body.to_string().as_bytes(),
        );
        let error = answer.json();
        self.tried.insert(status.to_string());
        if answer.status == status {
            if let Err(problem) = is_error_like(status, &error) {
                self.problems.push(format!("{status}: {problem}"));
            }
        } else {
            self.problems
                .push(format!("{status}: it is {} {error}", answer.status));
        }
        error
    }

    /// A WebSocket.
    fn socket(&self, path: &str) -> WebSocket<TcpStream> {
        let stream = self.client.connect();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut request = format!("ws://localhost/api/v1{path}")
            .into_client_request()
            .unwrap();
        let token = self.bearer.parse().unwrap();
        request.headers_mut().insert("authorization", token);
        tungstenite::client(request, stream).unwrap().0
    }

    /// Reads messages until one is of the example's kind, and compares it with it.
    fn message(&mut self, call: &str, socket: &mut WebSocket<TcpStream>) {
        let all = self.reference["messages"].as_array().unwrap().iter();
        let mut found = all.filter(|example| example["call"] == call);
        let example = found.next().unwrap()["message"].clone();
        let message = next(socket, example["event_type"].as_str().unwrap());
        self.tried.insert(call.to_owned());
        let mut problems = Vec::new();
        compare(&message, &example, "", &mut problems);
        let problems = problems.iter().map(|problem| format!("{call}: {problem}"));
        self.problems.extend(problems);
    }

    /// What the reference has and nobody has tried.
    fn untried(&self) -> Vec<String> {
        let of = |kind: &str| self.reference[kind].as_array().unwrap().iter();
        let examples = of("examples").chain(of("messages"));
        let calls = examples.map(|example| example["call"].as_str().unwrap());
        let errors = self.reference["errors"].as_object().unwrap().keys();
        calls
            .chain(errors.map(String::as_str))
            .filter(|name| !self.tried.contains(*name))
            .filter(|name| self.place.has_guests || *name != RESIZE)
            .map(str::to_owned)
            .collect()
    }
}

/// Removes a field wherever there is one of this name.
fn forget(value: &mut Value, name: &str) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| forget(value, name)),
        Value::Object(fields) => {
            fields.remove(name);
            fields.values_mut().for_each(|value| forget(value, name));
        }
        _ => {}
    }
}

/// The next message of this type.
fn next(socket: &mut WebSocket<TcpStream>, event_type: &str) -> Value {
    loop {
        if let Message::Text(text) = socket.read().unwrap() {
            let message: Value = serde_json::from_str(&text).unwrap();
            if message["event_type"] == event_type {
                return message;
            }
        }
    }
}

/// Method and path of a call, with these names in place of those in braces.
fn path_of(call: &str, names: &[&str]) -> (String, String) {
    let (method, path) = call.split_once(' ').unwrap();
    let mut names = names.iter();
    let words = path.split('/').map(|word| match word.starts_with('{') {
        true => names.next().unwrap(),
        false => word,
    });
    let path = words.collect::<Vec<_>>().join("/");
    assert!(names.next().is_none(), "too many names for {call}");
    (method.to_owned(), path)
}

/// Tries every example but those of 500 and 503, which no request of a client leads to: for these there is
/// [`is_error_like`]. What is not as the reference has it.
pub fn every_example(client: &dyn Client, place: &Place<'_>) -> Vec<String> {
    let mut api = Examples {
        reference: serde_json::from_str(REFERENCE).unwrap(),
        client,
        place,
        bearer: String::new(),
        tried: BTreeSet::from(["500".to_owned(), "503".to_owned()]),
        problems: Vec::new(),
    };
    accounts(&mut api);
    machine(&mut api);
    commands_and_files(&mut api);
    snapshots(&mut api);
    resources(&mut api);
    network(&mut api);
    security(&mut api);
    end(&mut api);
    assert_eq!(api.untried(), [""; 0]);
    api.problems
}

fn accounts(api: &mut Examples<'_>) {
    let user = json!({"username": "alice", "password": PASSWORD, "role": "admin"});
    api.call("POST /auth/register", &[], &user);
    let login = json!({"username": "alice", "password": PASSWORD});
    api.error(401, "GET", "/vms", &json!({}));
    let other = json!({"username": "mallory", "password": PASSWORD, "role": "admin"});
    api.error(403, "POST", "/auth/register", &other);
    let token = api.call("POST /auth/login", &[], &login);
    assert_eq!(token["token_type"], "bearer");
    assert_eq!(token["expires_in"], 3600);
    let bob = json!({"username": "bob", "password": PASSWORD, "role": "user"});
    let created = api.send(
        "POST",
        "/auth/register",
        "application/json",
        bob.to_string().as_bytes(),
    );
    assert_eq!(created.status, 201);
    api.bearer = format!("Bearer {}", token["access_token"].as_str().unwrap());
}

fn machine(api: &mut Examples<'_>) {
    let missing = api.error(404, "GET", "/vms/test-vm", &json!({}));
    assert_eq!(missing["message"], "VM 'test-vm' not found");
    api.error(400, "GET", "/vms?limit=101", &json!({}));
    let small = api.error(422, "POST", "/vms", &json!({"name": "a", "memory_mb": 64}));
    assert_eq!(small["details"][0]["field"], "memory_mb");
    let words = json!({"name": "test-vm", "os_type": "linux", "template": "linux-default"});
    let mut system = api.socket("/system/events");
    let created = api.call("POST /vms", &[], &words);
    assert_eq!(created["status"], "created", "{created}");
    api.message("WS /system/events", &mut system);
    let mut own = api.socket("/vms/test-vm/events");
    let taken = api.error(409, "POST", "/vms", &json!({"name": "test-vm"}));
    assert_eq!(taken["message"], "VM 'test-vm' already exists");
    api.call("GET /vms", &[], &Value::Null);
    let started = api.call("POST /vms/{vm_name}/start", &["test-vm"], &Value::Null);
    assert_eq!(started["status"], "running", "{started}");
    api.message("WS /vms/{vm_name}/events", &mut own);
    let queries = api.reference["queries"].as_array().unwrap().clone();
    for (query, count) in queries.iter().zip([0, 1, 1]) {
        let query = query.as_str().unwrap();
        let answer = api.send("GET", &format!("/vms{query}"), "application/json", b"");
        assert_eq!(answer.status, 200, "{query}");
        let list = answer.json();
        let found = (list["total"].as_u64(), list["vms"].as_array().map(Vec::len));
        assert_eq!(found, (Some(1), Some(count)), "{query}: {list}");
    }
    let vm = api.call("GET /vms/{vm_name}", &["test-vm"], &Value::Null);
    assert_eq!(vm["status"], "running", "{vm}");
}

fn commands_and_files(api: &mut Examples<'_>) {
    let directory = api.place.directory;
    let command = "pwd; echo $VAR1 $VAR2; echo err >&2";
    let execute = json!({"command": command, "working_directory": directory});
    let said = api.call("POST /vms/{vm_name}/execute", &["test-vm"], &execute);
    assert_eq!(
        said["stdout"],
        format!("{directory}\nvalue1 value2\n"),
        "{said}"
    );
    assert_eq!(
        (&said["stderr"], &said["exit_code"]),
        (&json!("err\n"), &json!(0))
    );

    let upload = "POST /vms/{vm_name}/files/upload";
    let file = format!("{directory}/filename.txt");
    let content = [0xff; 1024];
    let body = form(&[("path", &file), ("permissions", "600")], &content);
    let (method, path) = path_of(upload, &["test-vm"]);
    let answer = api.send(&method, &path, FORM, &body);
    api.check(upload, &answer);
    assert_eq!(answer.json()["size_bytes"], 1024);

    let download = "GET /vms/{vm_name}/files/download";
    let (method, path) = path_of(download, &["test-vm"]);
    let answer = api.send(&method, &format!("{path}?path={file}"), "", b"");
    api.check(download, &answer);
    assert_eq!(answer.kind, "application/octet-stream");
    assert_eq!(answer.body, content);

    let list = "GET /vms/{vm_name}/files";
    let query = format!("?path={directory}&recursive=true");
    let listed = api.call_with(list, &["test-vm"], &query, &Value::Null);
    let files = listed["files"].as_array().unwrap();
    let mut uploaded = files.iter().filter(|listed| listed["path"] == *file);
    let uploaded = uploaded.next().unwrap();
    assert_eq!(uploaded["permissions"], "600");
    assert_eq!(uploaded["is_directory"], false);
}

fn snapshots(api: &mut Examples<'_>) {
    let words = json!({"name": "first", "description": "before the change"});
    let taken = api.call("POST /vms/{vm_name}/snapshots", &["test-vm"], &words);
    assert!(taken["checksum"].as_str().unwrap().starts_with("sha256:"));
    api.call("GET /vms/{vm_name}/snapshots", &["test-vm"], &Value::Null);
    let names = ["test-vm", "first"];
    let restore = "POST /vms/{vm_name}/snapshots/{snapshot_name}/restore";
    api.call(restore, &names, &Value::Null);
    let delete = "DELETE /vms/{vm_name}/snapshots/{snapshot_name}";
    api.call(delete, &names, &Value::Null);
}

fn resources(api: &mut Examples<'_>) {
    api.call("GET /vms/{vm_name}/metrics", &["test-vm"], &Value::Null);
    if api.place.has_guests {
        api.call(RESIZE, &["test-vm"], &Value::Null);
    }
    api.call("GET /system/metrics", &[], &Value::Null);
    api.call("GET /health", &[], &Value::Null);
    api.call("GET /status", &[], &Value::Null);
}

fn network(api: &mut Examples<'_>) {
    let of_one = "GET /vms/{vm_name}/network";
    let forward = "POST /vms/{vm_name}/network/port-forward";
    if !api.place.has_network {
        let calls = ["GET /networks", of_one, forward].map(str::to_owned);
        api.tried.extend(calls);
        return;
    }
    api.call("GET /networks", &[], &Value::Null);
    let words = json!({"protocol": "tcp"});
    api.call(forward, &["test-vm"], &words);
    let network = api.call(of_one, &["test-vm"], &Value::Null);
    assert_eq!(network["connectivity_status"], "connected");
    assert_eq!(network["ip_address"], "192.168.200.100");
}

fn security(api: &mut Examples<'_>) {
    let logs = "GET /security/audit-logs";
    let query = "?action_type=vm_create&resource_type=vm&limit=100\
                 &start_time=2025-10-01T12:00:00Z&end_time=2999-10-01T12:00:00Z";
    let (method, path) = path_of(logs, &[]);
    let mut answer = api.send(&method, &(path + query), "", b"");
    let mut found = answer.json();
    let entries = found["logs"].as_array_mut().unwrap();
    // One that was refused has made no machine of which there is something to tell.
    entries.retain(|entry| entry["outcome"] == "success");
    assert_eq!(entries.len(), 1, "{entries:?}");
    answer.body = found.to_string().into_bytes();
    api.check(logs, &answer);

    let mut events = api.socket("/system/events");
    let words = json!({"scan_type": "configuration", "target": "test-vm"});
    let scan = api.call("POST /security/scan", &[], &words);
    let id = scan["scan_id"].as_str().unwrap_or("none").to_owned();
    let told = next(&mut events, "scan_ended");
    assert_eq!(told["data"]["scan_id"], *id, "{told}");
    api.call("GET /security/scans/{scan_id}", &[&id], &Value::Null);
}

fn end(api: &mut Examples<'_>) {
    let restarted = api.call("POST /vms/{vm_name}/restart", &["test-vm"], &Value::Null);
    assert_eq!(restarted["status"], "running", "{restarted}");
    let stopped = api.call("POST /vms/{vm_name}/stop", &["test-vm"], &Value::Null);
    assert_eq!(stopped["status"], "stopped", "{stopped}");
    api.call("DELETE /vms/{vm_name}", &["test-vm"], &Value::Null);
    assert_eq!(api.send("GET", "/vms/test-vm", "", b"").status, 404);
    // Who has failed often enough has to wait.
    let wrong = json!({"username": "bob", "password": "Wrong-horse-7"});
    let bearer = std::mem::take(&mut api.bearer);
    for _ in 0..10 {
        let body = wrong.to_string();
        api.send("POST", "/auth/login", "application/json", body.as_bytes());
    }
    api.error(429, "POST", "/auth/login", &wrong);
    api.bearer = bearer;
}
