//! A DNS forwarder on the gateway: it passes questions of sandboxes to resolvers of the host, if the
//! policy of the sandbox allows the name, and tells the packet filter of the answer before the
//! sandbox hears it.
//!
//! Questions are passed on as they are but for their number, which is random here, as is the port
//! that they are sent from (RFC 5452). An answer that is not one to the question is passed over.

mod upstream;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use super::namespace::Namespace;
pub use upstream::Upstreams;

/// Port of DNS.
pub const PORT: u16 = 53;
/// The largest question over UDP that is read: those with cookies and padding are a few hundred.
const MAX_QUESTION: usize = 4096;
/// How long a connection of a sandbox's may be idle.
const IDLE: Duration = Duration::from_secs(10);
/// How many questions of one sandbox are answered at a time; more are passed over.
pub const QUESTIONS_AT_A_TIME: usize = 32;
/// How much longer than an answer says an address may be connected to: a program takes its time.
const SLACK_SEC: u32 = 5;
/// The longest time that an address is held for, in seconds.
const MAX_TTL: u32 = 24 * 3600;

/// Whether a sandbox may look a name up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allowed,
    /// Its policy does not allow it.
    Denied,
    /// There is no such sandbox.
    Unknown,
}

/// What sandboxes may look up.
#[async_trait]
pub trait Names: Send + Sync {
    /// Whether the sandbox with this address may look up this name, which has no last dot.
    fn verdict(&self, client: Ipv4Addr, name: &str) -> Verdict;

    /// What questions of the sandbox with this address have to wait for.
    fn turns(&self, client: Ipv4Addr) -> Option<Arc<Semaphore>>;

    /// A sandbox is about to hear that a name has these addresses for so many seconds.
    async fn learned(&self, client: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]);
}

/// The sockets of a forwarder.
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

/// Listens on this address of the namespace.
///
/// # Errors
/// Another program does.
pub async fn listen(namespace: &Namespace, address: Ipv4Addr) -> io::Result<Sockets> {
    let (udp, tcp) = namespace
        .run(move || {
            let udp = std::net::UdpSocket::bind((address, PORT))?;
            let tcp = std::net::TcpListener::bind((address, PORT))?;
            udp.set_nonblocking(true)?;
            tcp.set_nonblocking(true)?;
            Ok((udp, tcp))
        })
        .await?;
    Ok(Sockets {
        udp: UdpSocket::from_std(udp)?,
        tcp: TcpListener::from_std(tcp)?,
    })
}

/// Serves until the sockets fail.
pub async fn serve(sockets: Sockets, names: Arc<dyn Names>, upstreams: Arc<Upstreams>) {
    let Sockets { udp, tcp } = sockets;
    let udp = Arc::new(udp);
    let by_udp = async {
        let mut buffer = vec![0; MAX_QUESTION];
        loop {
            let (length, from) = match udp.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    debug!(%error, "DNS socket");
                    continue;
                }
            };
            let Some((client, turn)) = turn(&*names, from) else {
                continue;
            };
            let question = buffer[..length].to_vec();
            let (names, upstreams, udp) =
                (Arc::clone(&names), Arc::clone(&upstreams), Arc::clone(&udp));
            tokio::spawn(async move {
                let _turn = turn;
                if let Some(reply) = answer(&*names, &upstreams, client, &question, false).await
                    && let Err(error) = udp.send_to(&reply, from).await
                {
                    debug!(%error, %from, "DNS answer not sent");
                }
            });
        }
    };
    let by_tcp = async {
        loop {
            let (stream, from) = match tcp.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "a DNS connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Some((client, turn)) = turn(&*names, from) else {
                continue;
            };
            let (names, upstreams) = (Arc::clone(&names), Arc::clone(&upstreams));
            tokio::spawn(async move {
                let _turn = turn;
                if let Err(error) = converse(&*names, &upstreams, client, stream).await {
                    debug!(%error, %from, "DNS connection");
                }
            });
        }
    };
    tokio::join!(by_udp, by_tcp);
}

/// Who asks, and its turn; `None` if nobody of us does, or it has asked too much at once.
fn turn(names: &dyn Names, from: SocketAddr) -> Option<(Ipv4Addr, OwnedSemaphorePermit)> {
    let SocketAddr::V4(from) = from else {
        return None;
    };
    let turns = names.turns(*from.ip())?;
    Some((*from.ip(), turns.try_acquire_owned().ok()?))
}

/// Answers the questions of one connection (RFC 1035, 4.2.2).
async fn converse(
    names: &dyn Names,
    upstreams: &Upstreams,
    client: Ipv4Addr,
    mut stream: TcpStream,
) -> io::Result<()> {
    loop {
        let read = async {
            let length = match stream.read_u16().await {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
                Err(error) => return Err(error),
            };
            let mut question = vec![0; usize::from(length)];
            stream.read_exact(&mut question).await?;
            Ok(Some(question))
        };
        let Ok(question) = tokio::time::timeout(IDLE, read).await else {
            return Ok(());
        };
        let Some(question) = question? else {
            return Ok(());
        };
        let Some(reply) = answer(names, upstreams, client, &question, true).await else {
            return Ok(());
        };
        let reply = framed(&reply)?;
        let written = tokio::time::timeout(IDLE, stream.write_all(&reply)).await;
        written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    }
}

/// A message with its length in front.
fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    Ok([&length.to_be_bytes(), message].concat())
}

/// The answer to a question; `None` if it is none.
async fn answer(
    names: &dyn Names,
    upstreams: &Upstreams,
    client: Ipv4Addr,
    question: &[u8],
    by_tcp: bool,
) -> Option<Vec<u8>> {
    let message = Message::from_vec(question).ok()?;
    if message.metadata.message_type != MessageType::Query {
        return None;
    }
    let refuse = |code| refusal(&message, code);
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = &message.queries[..] else {
        return refuse(ResponseCode::FormErr);
    };
    let name = plain(query.name());
    match names.verdict(client, &name) {
        Verdict::Allowed => {}
        Verdict::Denied => return refuse(ResponseCode::Refused),
        Verdict::Unknown => return None,
    }
    let Some((reply, parsed)) = ask(upstreams, question, query, by_tcp).await else {
        debug!(name, "no resolver has answered");
        return refuse(ResponseCode::ServFail);
    };
    let addresses = addresses(query, &parsed);
    if !addresses.is_empty() {
        names.learned(client, &name, &addresses).await;
    }
    Some(with_id(&reply, message.metadata.id))
}

/// A name without its last dot, in lower case.
fn plain(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

fn refusal(message: &Message, code: ResponseCode) -> Option<Vec<u8>> {
    let mut reply = Message::error_msg(message.metadata.id, message.metadata.op_code, code);
    reply.metadata.recursion_desired = message.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.queries.clone_from(&message.queries);
    reply.to_vec().ok()
}

/// The same message with another number.
fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(number) = message.get_mut(..2) {
        number.copy_from_slice(&id.to_be_bytes());
    }
    message
}

/// Asks one resolver after the other, until one answers.
async fn ask(
    upstreams: &Upstreams,
    question: &[u8],
    query: &Query,
    by_tcp: bool,
) -> Option<(Vec<u8>, Message)> {
    let id = rand::random();
    let question = with_id(question, id);
    let is_answer = |bytes: &[u8]| {
        let message = Message::from_vec(bytes).ok()?;
        let matches = message.metadata.id == id
            && message.metadata.message_type == MessageType::Response
            && matches!(&message.queries[..], [asked] if asked.name() == query.name()
                && asked.query_type() == query.query_type()
                && asked.query_class() == query.query_class());
        matches.then_some(message)
    };
    for upstream in upstreams.list() {
        let asked = if by_tcp {
            upstream.ask_by_tcp(&question, is_answer).await
        } else {
            upstream.ask_by_udp(&question, is_answer).await
        };
        match asked {
            Ok(answer) => return Some(answer),
            Err(error) => debug!(resolver = %upstream, %error, "a resolver has not answered"),
        }
    }
    None
}

/// The IPv4 addresses that an answer gives for its question, aliases followed, and for how many
/// seconds they may be used.
fn addresses(query: &Query, answer: &Message) -> Vec<(Ipv4Addr, u32)> {
    if query.query_type() != RecordType::A || query.query_class() != DNSClass::IN {
        return Vec::new();
    }
    let mut name = query.name().clone();
    let mut ttl = MAX_TTL;
    // An alias at most for each record.
    for _ in 0..=answer.answers.len() {
        let own = answer.answers.iter().filter(|record| record.name == name);
        let found: Vec<_> = own
            .clone()
            .filter_map(|record| match &record.data {
                RData::A(address) => {
                    let seconds = ttl.min(record.ttl).saturating_add(SLACK_SEC);
                    Some((address.0, seconds))
                }
                _ => None,
            })
            .collect();
        if !found.is_empty() {
            return found;
        }
        let alias = own.clone().find_map(|record| match &record.data {
            RData::CNAME(target) => Some((target.0.clone(), record.ttl)),
            _ => None,
        });
        let Some((target, seconds)) = alias else {
            break;
        };
        name = target;
        ttl = ttl.min(seconds);
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;
    use std::sync::Mutex;

    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, CNAME};
    use proptest::prelude::*;

    use super::*;

    const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 200, 5);

    /// A name, and its addresses for so many seconds.
    type Learned = (String, Vec<(Ipv4Addr, u32)>);

    #[derive(Default)]
    struct OneName(Mutex<Vec<Learned>>);

    #[async_trait]
    impl Names for OneName {
        fn verdict(&self, client: Ipv4Addr, name: &str) -> Verdict {
            match (client == CLIENT, name == "good.example") {
                (false, _) => Verdict::Unknown,
                (true, true) => Verdict::Allowed,
                (true, false) => Verdict::Denied,
            }
        }

        fn turns(&self, _: Ipv4Addr) -> Option<Arc<Semaphore>> {
            None
        }

        async fn learned(&self, _: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]) {
            let learned = (name.to_owned(), addresses.to_vec());
            self.0.lock().unwrap().push(learned);
        }
    }

    fn question(name: &str) -> Message {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_str(name).unwrap(), RecordType::A));
        message
    }

    fn record(name: &str, ttl: u32, data: RData) -> Record {
        Record::from_rdata(Name::from_str(name).unwrap(), ttl, data)
    }

    fn to(address: [u8; 4]) -> RData {
        RData::A(A(address.into()))
    }

    fn alias(name: &str) -> RData {
        RData::CNAME(CNAME(Name::from_str(name).unwrap()))
    }

    /// A resolver that first gives an answer to nobody's question, and then one to the question.
    async fn resolver() -> (Upstreams, tokio::task::JoinHandle<()>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 512];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let asked = Message::from_vec(&buffer[..length]).unwrap();
                let mut reply = Message::response(asked.metadata.id, OpCode::Query);
                reply.queries.clone_from(&asked.queries);
                reply.add_answer(record("good.example.", 60, to([203, 0, 113, 7])));
                let mut other = reply.clone();
                other.metadata.id = asked.metadata.id.wrapping_add(1);
                for message in [other, reply] {
                    let bytes = message.to_vec().unwrap();
                    socket.send_to(&bytes, from).await.unwrap();
                }
            }
        });
        (Upstreams::fixed(vec![address]), task)
    }

    #[tokio::test]
    async fn an_allowed_name_is_resolved_and_learned_of() {
        let (upstreams, task) = resolver().await;
        let names = OneName::default();
        let asked = question("GOOD.example.");
        let bytes = asked.to_vec().unwrap();
        let reply = answer(&names, &upstreams, CLIENT, &bytes, false).await;
        let reply = Message::from_vec(&reply.unwrap()).unwrap();
        assert_eq!(reply.metadata.id, asked.metadata.id);
        assert_eq!(reply.answers.len(), 1);
        let expected = vec![(Ipv4Addr::new(203, 0, 113, 7), 65)];
        let learned = names.0.lock().unwrap().clone();
        assert_eq!(learned, [("good.example".to_owned(), expected)]);
        task.abort();
    }

    #[tokio::test]
    async fn other_names_are_refused_and_strangers_are_not_answered() {
        let (upstreams, task) = resolver().await;
        let names = OneName::default();
        let bytes = question("bad.example.").to_vec().unwrap();
        let reply = answer(&names, &upstreams, CLIENT, &bytes, false).await;
        let reply = Message::from_vec(&reply.unwrap()).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
        assert_eq!(reply.queries.len(), 1);
        let stranger = Ipv4Addr::new(192, 168, 200, 6);
        let reply = answer(&names, &upstreams, stranger, &bytes, false).await;
        assert_eq!(reply, None);
        assert!(names.0.lock().unwrap().is_empty());
        task.abort();
    }

    #[test]
    fn aliases_are_followed_and_the_shortest_time_counts() {
        let asked = question("a.example.");
        let query = &asked.queries[0];
        let mut reply = Message::response(1, OpCode::Query);
        reply.add_answers([
            record("b.example.", 10, alias("c.example.")),
            record("a.example.", 300, alias("b.example.")),
            record("c.example.", 600, to([203, 0, 113, 1])),
            record("c.example.", 5, to([203, 0, 113, 2])),
            record("else.example.", 600, to([203, 0, 113, 3])),
        ]);
        assert_eq!(
            addresses(query, &reply),
            [
                (Ipv4Addr::new(203, 0, 113, 1), 15),
                (Ipv4Addr::new(203, 0, 113, 2), 10)
            ]
        );
        let mut circle = Message::response(1, OpCode::Query);
        circle.add_answers([
            record("a.example.", 1, alias("b.example.")),
            record("b.example.", 1, alias("a.example.")),
        ]);
        assert_eq!(addresses(query, &circle), []);
    }

    proptest! {
        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let names = OneName::default();
            let none = Upstreams::fixed(Vec::new());
            runtime.block_on(answer(&names, &none, CLIENT, &bytes, false));
        }
    }
}
