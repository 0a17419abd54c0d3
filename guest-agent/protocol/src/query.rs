//! Percent-encoding of query values (RFC 3986, section 2.1).

/// Encodes all bytes but the unreserved ones and `/`.
pub fn percent_encode(bytes: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte));
            }
            _ => {
                out.push('%');
                out.push(char::from(HEX[usize::from(byte >> 4)]));
                out.push(char::from(HEX[usize::from(byte & 15)]));
            }
        }
    }
    out
}

/// Decodes percent-encoded text; `None` where a `%` is not followed by two hexadecimal digits.
pub fn percent_decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let high = char::from(bytes.next()?).to_digit(16)?;
            let low = char::from(bytes.next()?).to_digit(16)?;
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_truncated_or_wrong_escape_is_refused() {
        for text in ["%", "%4", "%zz", "a%4", "%+1"] {
            assert_eq!(percent_decode(text), None, "{text}");
        }
        assert_eq!(percent_decode("a+b%2f%C3"), Some(b"a+b/\xc3".to_vec()));
    }

    proptest! {
        #[test]
        fn any_bytes_survive(bytes: Vec<u8>) {
            let encoded = percent_encode(&bytes);
            prop_assert!(encoded.bytes().all(|b| b.is_ascii_graphic()));
            prop_assert!(!encoded.contains(['&', '=', '#', '?', '+']));
            prop_assert_eq!(percent_decode(&encoded), Some(bytes));
        }

        #[test]
        fn any_text_decodes_or_is_refused(text: String) {
            let _ = percent_decode(&text);
        }
    }
}
