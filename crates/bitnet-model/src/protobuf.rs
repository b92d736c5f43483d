//! Protocol-buffer messages as they lie in a file: what the readers and writers of SentencePiece's
//! and ONNX's files share. Which field means what is theirs to know.

/// A message that ends early or is none at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

/// The value of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wire<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    /// A text, bytes, a message inside, or packed numbers.
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
}

/// The fields of a message in their order: numbers and values.
#[derive(Debug, Clone)]
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

/// The fields of `message`.
pub(crate) fn fields(message: &[u8]) -> Fields<'_> {
    Fields { rest: message }
}

/// Numbers that a repeated field holds in one piece.
pub(crate) fn packed_varints(bytes: &[u8]) -> impl Iterator<Item = Result<u64, Broken>> {
    let mut fields = fields(bytes);
    std::iter::from_fn(move || {
        (!fields.rest.is_empty()).then(|| {
            let value = fields.varint().ok_or(Broken);
            if value.is_err() {
                fields.rest = &[];
            }
            value
        })
    })
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(length).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Wire<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(self.take(8)?.try_into().expect("eight bytes were taken")),
            2 => {
                let length = self.varint()?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Fixed32(self.take(4)?.try_into().expect("four bytes were taken")),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), Broken>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field.ok_or(Broken))
    }
}

/// A message that is being written, field after field.
#[derive(Debug, Clone, Default)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A number that is not negative, or an enumeration's.
    pub(crate) fn varint(mut self, field: u64, value: u64) -> Self {
        self.push_varint(field << 3);
        self.push_varint(value);
        self
    }

    /// A text, or bytes.
    pub(crate) fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.push_varint(field << 3 | 2);
        self.push_varint(value.as_ref().len() as u64);
        self.0.extend_from_slice(value.as_ref());
        self
    }

    /// A message inside.
    pub(crate) fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, value.0)
    }

    /// As many fields of one number as there are values, each written by `write`.
    pub(crate) fn each<T>(
        self,
        values: impl IntoIterator<Item = T>,
        write: impl Fn(Self, T) -> Self,
    ) -> Self {
        values.into_iter().fold(self, write)
    }

    /// The message's bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn push_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let inner = Message::default().varint(1, 300);
        let bytes = Message::default()
            .varint(1, u64::MAX)
            .bytes(2, "text")
            .message(900, inner)
            .into_bytes();
        let read: Result<Vec<_>, _> = fields(&bytes).collect();
        let expected = vec![
            (1, Wire::Varint(u64::MAX)),
            (2, Wire::Bytes(b"text")),
            (900, Wire::Bytes(&[8, 0xAC, 2])),
        ];
        assert_eq!(read, Ok(expected));
    }

    #[test]
    fn the_example_of_the_format_s_own_guide_is_read_and_written() {
        // "Encoding" in the documentation of protocol buffers: field 1 with the value 150.
        assert_eq!(
            fields(&[0x1D, 0, 0, 0xC0, 0x3F]).next(),
            Some(Ok((3, Wire::Fixed32([0, 0, 0xC0, 0x3F]))))
        );
        assert_eq!(Message::default().varint(1, 150).into_bytes(), [0x08, 0x96, 0x01]);
        assert_eq!(
            packed_varints(&[3, 0x8E, 2, 0x9E, 0xA7, 5]).collect::<Vec<_>>(),
            [Ok(3), Ok(270), Ok(86942)]
        );
    }

    #[test]
    fn what_is_cut_short_ends_in_one_error() {
        for bytes in
            [&[0x0A, 2, 0][..], &[0x08], &[0x08, 0x80], &[0x0D, 0, 0], &[0x0B], &[0xFF; 12]]
        {
            let read: Vec<_> = fields(bytes).collect();
            assert_eq!(read, [Err(Broken)], "{bytes:?}");
        }
        assert_eq!(packed_varints(&[1, 0x80]).collect::<Vec<_>>(), [Ok(1), Err(Broken)]);
    }
}
