//! Text in pieces that are cut anywhere.

use bytes::{Bytes, BytesMut};

/// The most bytes of a character in UTF-8.
const MAX_CHARACTER: usize = 4;

/// A stream of bytes that is given on in pieces which end between characters, as far as it is UTF-8.
#[derive(Debug, Default)]
pub struct Text {
    /// The beginning of a character, whose end has not come yet.
    begun: BytesMut,
}

impl Text {
    /// What can be given on once `bytes` have come; `None` if that is nothing.
    pub fn push(&mut self, bytes: &Bytes) -> Option<Bytes> {
        let mut all = if self.begun.is_empty() {
            bytes.clone()
        } else {
            self.begun.extend_from_slice(bytes);
            std::mem::take(&mut self.begun).freeze()
        };
        let begun = all.split_off(all.len() - length_of_begun(&all));
        self.begun = BytesMut::from(&begun[..]);
        (!all.is_empty()).then_some(all)
    }

    /// The beginning of a character that did not come to its end.
    pub fn rest(self) -> Option<Bytes> {
        (!self.begun.is_empty()).then(|| self.begun.freeze())
    }
}

/// How many bytes at the end of `bytes` are the beginning of a character.
fn length_of_begun(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(MAX_CHARACTER - 1)..];
    let first = tail.iter().rposition(|byte| !is_continuation(*byte));
    let Some(character) = first.and_then(|first| tail.get(first..)) else {
        return 0;
    };
    match std::str::from_utf8(character) {
        Err(error) if error.error_len().is_none() => character.len(),
        _ => 0,
    }
}

fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(bytes: &[u8], cuts: &[usize]) -> Vec<Bytes> {
        let mut text = Text::default();
        let mut pieces = Vec::new();
        let mut begin = 0;
        for &cut in cuts {
            let cut = (begin + cut).min(bytes.len());
            pieces.extend(text.push(&Bytes::copy_from_slice(&bytes[begin..cut])));
            begin = cut;
        }
        pieces.extend(text.push(&Bytes::copy_from_slice(&bytes[begin..])));
        pieces.extend(text.rest());
        pieces
    }

    proptest! {
        #[test]
        fn characters_stay_whole(text: String, cuts in proptest::collection::vec(0_usize..9, 0..20)) {
            let pieces = pieces(text.as_bytes(), &cuts);
            for piece in &pieces {
                prop_assert!(std::str::from_utf8(piece).is_ok(), "{piece:?}");
            }
            prop_assert_eq!(pieces.concat(), text.into_bytes());
        }

        #[test]
        fn no_byte_is_lost_or_held_for_long(
            bytes: Vec<u8>,
            cuts in proptest::collection::vec(0_usize..9, 0..20),
        ) {
            prop_assert_eq!(pieces(&bytes, &cuts).concat(), bytes);
        }
    }

    #[test]
    fn what_cannot_become_a_character_does_not_wait() {
        let mut text = Text::default();
        for bytes in [&b"a\xff"[..], b"\x80", b"\xe2\x28", b"\xf4\x90"] {
            let bytes = Bytes::from(bytes);
            assert_eq!(text.push(&bytes), Some(bytes));
        }
        assert_eq!(text.push(&Bytes::from(&b"\xf0\x9f\xa6"[..])), None);
        let crab = Bytes::from("\u{1f980}");
        assert_eq!(text.push(&Bytes::from(&b"\x80"[..])), Some(crab));
        assert_eq!(text.rest(), None);
    }
}
