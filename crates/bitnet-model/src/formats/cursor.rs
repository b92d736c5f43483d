//! Reading little-endian numbers from bytes that may end anywhere.

/// A position in a file's bytes. Every read is checked against the end and gives `None` there,
/// leaving the position where it was.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    /// Starts at byte `position`; a position behind the end reads nothing.
    pub(super) fn new(bytes: &'a [u8], position: usize) -> Self {
        Cursor { bytes, position }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.position)
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let end = self.position.checked_add(usize::try_from(count).ok()?)?;
        let taken = self.bytes.get(self.position..end)?;
        self.position = end;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N as u64)?.try_into().ok()
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::Cursor;

    #[test]
    fn reads_past_the_end_give_nothing_and_do_not_move() {
        let mut cursor = Cursor::new(&[1, 0, 2], 0);
        assert_eq!(cursor.u16(), Some(1));
        assert_eq!((cursor.u16(), cursor.take(u64::MAX), cursor.position()), (None, None, 2));
        assert_eq!((cursor.u8(), cursor.remaining()), (Some(2), 0));
        assert_eq!(Cursor::new(&[1], 9).u8(), None);
    }
}
