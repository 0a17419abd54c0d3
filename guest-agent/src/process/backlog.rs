//! The latest output of a process, within a bound.
//!
//! Pieces of one stream are joined up to a size, so that a process that writes byte by byte costs no
//! more than its bytes; what alternates between the streams is bounded by counting what each piece
//! costs beside its bytes.

use std::collections::VecDeque;

use agent_protocol::{FrameKind, MAX_BACKLOG};

/// Up to this size pieces are joined, in bytes. Also the most that is read back at once.
pub const PIECE: usize = 16 * 1024;
/// What a piece costs beside its bytes: itself, and what the allocator adds.
const OVERHEAD: usize = size_of::<Piece>() + 16;
/// All that may be spent, in bytes.
const BUDGET: usize = MAX_BACKLOG + (MAX_BACKLOG / PIECE + 1) * OVERHEAD;

/// A stream of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Source {
    /// The frames that carry it.
    pub fn frame(self) -> FrameKind {
        match self {
            Self::Stdout => FrameKind::Stdout,
            Self::Stderr => FrameKind::Stderr,
        }
    }
}

#[derive(Debug)]
struct Piece {
    source: Source,
    bytes: Vec<u8>,
}

impl Piece {
    fn cost(&self) -> usize {
        self.bytes.capacity() + OVERHEAD
    }

    /// Doubles its room if `len` more bytes do not fit, but to no more than [`PIECE`].
    fn make_room(&mut self, len: usize) {
        let needed = self.bytes.len() + len;
        if needed > self.bytes.capacity() {
            let room = needed.max((2 * self.bytes.len()).min(PIECE));
            self.bytes.reserve_exact(room - self.bytes.len());
        }
    }
}

/// What a reader finds at its place.
#[derive(Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Bytes that it has missed.
    pub lost: u64,
    /// Where these are from.
    pub source: Source,
    /// Bytes that follow.
    pub bytes: &'a [u8],
}

/// The latest output. Places are counted in bytes since the start of the process.
#[derive(Debug, Default)]
pub struct Backlog {
    pieces: VecDeque<Piece>,
    spent: usize,
    /// The place of the first byte that is kept.
    begin: u64,
    /// The place of the next byte.
    end: u64,
}

impl Backlog {
    /// Adds what a process has written.
    pub fn push(&mut self, source: Source, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = match self.pieces.back_mut() {
                Some(last) if last.source == source && last.bytes.len() < PIECE => {
                    let (now, rest) = bytes.split_at(bytes.len().min(PIECE - last.bytes.len()));
                    self.spent -= last.cost();
                    last.make_room(now.len());
                    last.bytes.extend_from_slice(now);
                    self.spent += last.cost();
                    Some((now.len(), rest))
                }
                _ => None,
            };
            let (added, rest) = room.unwrap_or_else(|| {
                let (now, rest) = bytes.split_at(bytes.len().min(PIECE));
                let piece = Piece {
                    source,
                    bytes: now.to_vec(),
                };
                self.spent += piece.cost();
                self.pieces.push_back(piece);
                (now.len(), rest)
            });
            self.end += added as u64;
            bytes = rest;
        }
        while self.spent > BUDGET
            && let Some(oldest) = self.pieces.pop_front()
        {
            self.spent -= oldest.cost();
            self.begin += oldest.bytes.len() as u64;
        }
    }

    /// What is at `place`, or, if that is gone, at the first place after it that is kept; at most
    /// [`PIECE`] bytes. `None` at the end.
    pub fn at(&self, place: u64) -> Option<Found<'_>> {
        let lost = self.begin.saturating_sub(place);
        let mut skip = place.max(self.begin) - self.begin;
        for piece in &self.pieces {
            let len = piece.bytes.len() as u64;
            match usize::try_from(skip) {
                Ok(within) if skip < len => {
                    return Some(Found {
                        lost,
                        source: piece.source,
                        bytes: &piece.bytes[within..],
                    });
                }
                _ => skip -= len,
            }
        }
        None
    }

    /// Forgets that it may grow.
    pub fn shrink(&mut self) {
        for piece in &mut self.pieces {
            self.spent -= piece.cost();
            piece.bytes.shrink_to_fit();
            self.spent += piece.cost();
        }
        self.pieces.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All that a reader finds who begins at `place`: bytes lost, and the bytes of each source.
    fn read(backlog: &Backlog, mut place: u64) -> (u64, Vec<u8>, Vec<u8>) {
        let (mut lost, mut stdout, mut stderr) = (0, Vec::new(), Vec::new());
        while let Some(found) = backlog.at(place) {
            lost += found.lost;
            place += found.lost + found.bytes.len() as u64;
            match found.source {
                Source::Stdout => stdout.extend_from_slice(found.bytes),
                Source::Stderr => stderr.extend_from_slice(found.bytes),
            }
        }
        (lost, stdout, stderr)
    }

    #[test]
    fn the_latest_bytes_stay_and_the_gap_is_told() {
        let mut backlog = Backlog::default();
        let all: Vec<u8> = (0..3 * MAX_BACKLOG).map(|n| (n / 1000) as u8).collect();
        for part in all.chunks(1000) {
            backlog.push(Source::Stdout, part);
        }
        let (lost, kept, _) = read(&backlog, 0);
        assert_eq!(lost as usize + kept.len(), all.len());
        assert_eq!(kept, all[all.len() - kept.len()..]);
        assert!(kept.len() > MAX_BACKLOG - PIECE && kept.len() <= MAX_BACKLOG + PIECE);
        // Who has read some already has lost less, and who has read all has lost nothing.
        let (less, same, _) = read(&backlog, 1000);
        assert_eq!((less, same), (lost - 1000, kept));
        assert_eq!(backlog.at(all.len() as u64), None);
    }

    #[test]
    fn bytes_that_alternate_between_the_streams_do_not_cost_more() {
        let mut backlog = Backlog::default();
        for _ in 0..MAX_BACKLOG {
            backlog.push(Source::Stdout, b"o");
            backlog.push(Source::Stderr, b"e");
        }
        assert!(backlog.spent <= BUDGET);
        assert!(backlog.pieces.len() * OVERHEAD <= BUDGET);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_below_the_bound(
            parts in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..2000)), 0..60),
        ) {
            let mut backlog = Backlog::default();
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            for (is_stdout, bytes) in &parts {
                if *is_stdout {
                    backlog.push(Source::Stdout, bytes);
                    stdout.extend_from_slice(bytes);
                } else {
                    backlog.push(Source::Stderr, bytes);
                    stderr.extend_from_slice(bytes);
                }
            }
            let spent: usize = backlog.pieces.iter().map(Piece::cost).sum();
            prop_assert_eq!(backlog.spent, spent);
            prop_assert_eq!(read(&backlog, 0), (0, stdout.clone(), stderr.clone()));
            backlog.shrink();
            prop_assert_eq!(read(&backlog, 0), (0, stdout, stderr));
        }
    }
}
