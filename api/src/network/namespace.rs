//! Threads that live in a network namespace.
//!
//! What a socket, a tap or a child process belongs to is decided by the thread that makes it. So
//! whatever touches the network of the sandboxes is made on a thread of this kind, and can then be
//! used on any.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Where `ip netns` keeps namespaces by name.
const NAMED: &str = "/run/netns";

type Job = Box<dyn FnOnce() + Send>;

/// A thread that lives in a network namespace. It ends when this is dropped.
#[derive(Debug, Clone)]
pub struct Namespace {
    jobs: mpsc::Sender<Job>,
}

/// Why there is no thread in a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// There is no such namespace.
    #[error(
        "the network namespace {path} that network.namespace names cannot be opened; `ip netns \
         add` makes one",
        path = path.display()
    )]
    Open {
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It cannot be entered.
    #[error("the network namespace cannot be entered")]
    Enter(#[source] io::Error),
    /// There is no thread for it.
    #[error("no thread can be started for the network")]
    Thread(#[source] io::Error),
}

impl Namespace {
    /// A thread in the namespace of this name or absolute path; in that of the daemon, if there is
    /// none. To be called within a runtime, whose sockets the thread can then make.
    ///
    /// # Errors
    /// The namespace is not there, or may not be entered.
    pub async fn enter(namespace: Option<&str>) -> Result<Self, NamespaceError> {
        let file = match namespace {
            Some(name) => {
                let path = Path::new(NAMED).join(name);
                Some(File::open(&path).map_err(|source| NamespaceError::Open { path, source })?)
            }
            None => None,
        };
        let runtime = Handle::current();
        let (jobs, received) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("network".to_owned())
            .spawn(move || {
                let _runtime = runtime.enter();
                for job in received {
                    job();
                }
            })
            .map_err(NamespaceError::Thread)?;
        let namespace = Self { jobs };
        if let Some(file) = file {
            let entered = namespace
                .run(move || {
                    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                        .map_err(io::Error::from)
                })
                .await;
            entered.map_err(NamespaceError::Enter)?;
        }
        Ok(namespace)
    }

    /// Does this on the thread, after what it was given before. It may block.
    ///
    /// # Errors
    /// That of `work`, or the thread is gone.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let gone = || io::Error::other("the thread of the network is gone");
        let (reply, result) = oneshot::channel();
        let job = Box::new(move || drop(reply.send(work())));
        self.jobs.send(job).map_err(|_| gone())?;
        result.await.unwrap_or_else(|_| Err(gone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_is_done_in_order_on_a_thread_of_its_own() {
        let namespace = Namespace::enter(None).await.unwrap();
        let here = std::thread::current().id();
        let there = || Ok(std::thread::current().id());
        let first = namespace.run(there).await.unwrap();
        let second = namespace.run(there).await.unwrap();
        assert!(first != here && first == second);
        let failed = namespace.run(|| Err::<(), _>(io::ErrorKind::NotFound.into()));
        assert_eq!(failed.await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_told_by_its_path() {
        let error = Namespace::enter(Some("no-such-namespace"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/run/netns/no-such-namespace"));
    }
}
