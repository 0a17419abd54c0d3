//! Errors quote what clients send, which may be a body of a megabyte.

/// The longest message of an error, in bytes: room for the ends of a guest's console and of what its VMM
/// said, which are the longest that are not the client's.
const MAX_MESSAGE: usize = 16 * 1024;

/// A message of an error, shortened if it is longer than any that is meant to be read.
pub fn message(text: String) -> String {
    shortened(text, MAX_MESSAGE)
}

/// At most `max` bytes of a text: its beginning and its end, for what was expected often comes behind what
/// is quoted.
pub fn shortened(text: String, max: usize) -> String {
    const LEFT_OUT: &str = " … ";
    if text.len() <= max {
        return text;
    }
    let half = max.saturating_sub(LEFT_OUT.len()) / 2;
    let (begin, end) = (
        text.floor_char_boundary(half),
        text.ceil_char_boundary(text.len() - half),
    );
    format!("{}{LEFT_OUT}{}", &text[..begin], &text[end..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_middle_is_left_out() {
        let text = || format!("unknown variant `{}`, expected tcp", "x".repeat(1 << 20));
        let told = shortened(text(), 64);
        assert_eq!(told.len(), 63);
        assert!(told.starts_with("unknown variant `x"), "{told}");
        assert!(told.ends_with("x`, expected tcp"), "{told}");
        assert!(message(text()).len() <= MAX_MESSAGE);
        assert_eq!(message("short".to_owned()), "short");
    }

    proptest! {
        #[test]
        fn no_text_is_too_long_or_cut_within_a_character(text: String, max in 8_usize..64) {
            let told = shortened(text.clone(), max);
            prop_assert!(told.len() <= max);
            prop_assert!(text.len() > max || told == text);
        }
    }
}
