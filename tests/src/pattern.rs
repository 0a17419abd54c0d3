//! Long content that need not be kept to be compared.

use std::io::{self, Read};

/// Pseudo-random bytes; the same seed gives the same bytes.
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    used: usize,
}

impl Pattern {
    /// The bytes of this seed, without end; `take` limits them.
    pub fn new(seed: u64) -> Self {
        Self {
            // The generator's state must not be zero.
            state: seed.wrapping_mul(2).wrapping_add(1),
            word: [0; 8],
            used: 8,
        }
    }

    /// The first `len` bytes of this seed.
    pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Self::new(seed).fill(&mut bytes);
        bytes
    }

    fn fill(&mut self, mut buffer: &mut [u8]) {
        while !buffer.is_empty() {
            if self.used == self.word.len() {
                // Marsaglia's xorshift64 (Journal of Statistical Software 8, 2003).
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                self.word = self.state.to_le_bytes();
                self.used = 0;
            }
            let count = buffer.len().min(self.word.len() - self.used);
            let (head, rest) = buffer.split_at_mut(count);
            head.copy_from_slice(&self.word[self.used..self.used + count]);
            self.used += count;
            buffer = rest;
        }
    }
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill(buffer);
        Ok(buffer.len())
    }
}

/// Checks that `content` is the first `len` bytes of the seed, and nothing more.
///
/// # Panics
/// It is not.
pub fn assert_pattern(content: impl Read, seed: u64, len: u64) {
    let mut content = io::BufReader::with_capacity(64 * 1024, content);
    let mut expected = Pattern::new(seed);
    let (mut got, mut want) = ([0; 16 * 1024], [0; 16 * 1024]);
    let mut at = 0;
    loop {
        let count = content
            .read(&mut got)
            .unwrap_or_else(|error| panic!("content broke off at byte {at}: {error}"));
        if count == 0 {
            break;
        }
        expected.fill(&mut want[..count]);
        assert!(
            got[..count] == want[..count],
            "content differs after byte {at}"
        );
        at += count as u64;
    }
    assert_eq!(at, len, "length of the content");
}
