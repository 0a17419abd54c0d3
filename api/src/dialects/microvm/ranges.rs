//! Parts of files: what a request asks for, and what is cut out of a stream for it.

use axum::body::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};

/// One range of a request, RFC 9110, section 14.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From this byte on, to that one or the last.
    From(u64, Option<u64>),
    /// The last so many.
    Last(u64),
}

impl Range {
    /// `None` for what may be ignored: another unit, several ranges, or nonsense.
    pub fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
        let number = |digits: &str| {
            let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|_| is_number)
        };
        match (first, last) {
            ("", last) => Some(Self::Last(number(last)?)),
            (first, "") => Some(Self::From(number(first)?, None)),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From(first, Some(last)))
            }
        }
    }

    /// The first and last byte of it that a file of `size` bytes has, if it has any.
    pub fn within(self, size: u64) -> Option<(u64, u64)> {
        let end = size.checked_sub(1)?;
        match self {
            Self::From(first, last) if first <= end => {
                Some((first, last.map_or(end, |last| last.min(end))))
            }
            Self::Last(count) if count > 0 => Some((size.saturating_sub(count), end)),
            Self::From(..) | Self::Last(_) => None,
        }
    }
}

/// The bytes from `start` on, `length` of them.
pub fn part_of(
    content: BoxStream<'static, std::io::Result<Bytes>>,
    start: u64,
    length: u64,
) -> BoxStream<'static, std::io::Result<Bytes>> {
    let state = (content, start, length);
    stream::try_unfold(state, |(mut content, mut skip, mut left)| async move {
        while left > 0 {
            let Some(piece) = content.next().await else {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            };
            let mut piece = piece?;
            let before = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= before as u64;
            let _ = piece.split_to(before);
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= piece.len() as u64;
            if !piece.is_empty() {
                return Ok(Some((piece, (content, skip, left))));
            }
        }
        Ok(None)
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        for (text, size, expected) in [
            ("bytes=0-0", 10, Some((0, 0))),
            ("bytes=2-", 10, Some((2, 9))),
            ("bytes=2-99", 10, Some((2, 9))),
            ("bytes=-3", 10, Some((7, 9))),
            ("bytes=-99", 10, Some((0, 9))),
            ("bytes=10-", 10, None),
            ("bytes=-0", 10, None),
            ("bytes=0-", 0, None),
        ] {
            assert_eq!(Range::parse(text).unwrap().within(size), expected, "{text}");
        }
        for ignored in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=3-2",
            "items=0-1",
            "bytes=0-1,3-4",
            "bytes=+1-2",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(Range::parse(ignored), None, "{ignored}");
        }
    }

    #[tokio::test]
    async fn a_part_is_cut_out_of_pieces() {
        for (start, length, expected) in [(0, 6, "abcdef"), (1, 1, "b"), (2, 3, "cde"), (3, 0, "")]
        {
            let pieces = ["ab", "", "cd", "ef"].map(|piece| Ok(Bytes::from(piece)));
            let part = part_of(stream::iter(pieces).boxed(), start, length);
            let part: Vec<Bytes> = part.map(Result::unwrap).collect().await;
            assert_eq!(part.concat(), expected.as_bytes());
        }
    }
}
