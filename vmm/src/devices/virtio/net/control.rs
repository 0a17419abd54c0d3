//! The control queue (virtio 1.2, 5.1.6.5): commands of the driver, each a class, a command, its
//! data, and one byte for the answer.
//!
//! It is there for one thing: how many pairs of queues the driver uses. A card without several has
//! none. Filters and addresses need no command, since the tap hands over all frames anyway.

use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::devices::virtio::buffers::ChainBuffers;

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Receive on this many pairs of queues.
    UsePairs(usize),
}

/// Carries out the command in `buffers`, if it is one that this card knows, by `act`, which says
/// whether it could be done. Returns the number of bytes written to the chain.
pub fn execute(mut buffers: ChainBuffers<'_>, act: impl FnOnce(Command) -> bool) -> u32 {
    let Some(status) = buffers.writable.split_last() else {
        debug!("net: command without room for an answer");
        return 0;
    };
    let done = parse(&mut buffers).is_some_and(act);
    let code = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    status.copy_from(&[code as u8]);
    // The answer counts only if nothing before it was left out (virtio 1.2, 2.7.8.2).
    u32::from(buffers.writable.is_empty())
}

fn parse(buffers: &mut ChainBuffers<'_>) -> Option<Command> {
    let [class, command] = buffers.readable.read_front()?;
    match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            let pairs = u16::from_le_bytes(buffers.readable.read_front()?);
            Some(Command::UsePairs(pairs.into()))
        }
        (class, command) => {
            debug!(class, command, "net: unknown command");
            None
        }
    }
}
