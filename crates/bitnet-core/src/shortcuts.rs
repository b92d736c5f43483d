//! Exact shortcuts: which may be taken, and how much those of a backend saved. None of them changes
//! a bit of a result.

use std::iter::Sum;
use std::ops::Sub;
use std::str::FromStr;

/// Which exact shortcuts may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortcuts {
    /// Skipping what a zero gate makes zero in a feed-forward network.
    pub sparsity: bool,
    /// Screening the rows of the output head in reduced precision.
    pub head: bool,
    /// Using the keys and values of a prefix for every request that begins with it: taken by engines,
    /// not by backends.
    pub prefix: bool,
    /// Guessing tokens that are computed together with the last one, for requests that ask for it:
    /// taken by engines, not by backends.
    pub speculation: bool,
}

impl Shortcuts {
    /// Every shortcut.
    pub const ALL: Shortcuts =
        Shortcuts { sparsity: true, head: true, prefix: true, speculation: true };

    /// No shortcut.
    pub const NONE: Shortcuts =
        Shortcuts { sparsity: false, head: false, prefix: false, speculation: false };

    /// Name of the environment variable that turns shortcuts off.
    pub const VARIABLE: &str = "BITNET_SHORTCUTS";

    /// The shortcuts that the environment variable `BITNET_SHORTCUTS` leaves on: all of them where
    /// it is not set.
    ///
    /// # Errors
    /// If its value is neither `off` nor names of shortcuts.
    pub fn from_env() -> Result<Shortcuts, UnknownShortcut> {
        match std::env::var_os(Shortcuts::VARIABLE) {
            None => Ok(Shortcuts::ALL),
            Some(value) => value.to_string_lossy().parse(),
        }
    }
}

impl Default for Shortcuts {
    fn default() -> Self {
        Shortcuts::ALL
    }
}

/// A word that names no shortcut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown shortcut `{0}` in {variable}: give off, or a list such as head,sparsity of those to \
     turn off", variable = Shortcuts::VARIABLE
)]
pub struct UnknownShortcut(String);

impl FromStr for Shortcuts {
    type Err = UnknownShortcut;

    /// Reads `on`, `off`, or a comma-separated list of the shortcuts to turn off.
    fn from_str(text: &str) -> Result<Self, UnknownShortcut> {
        match text.trim() {
            "" | "on" => return Ok(Shortcuts::ALL),
            "off" => return Ok(Shortcuts::NONE),
            _ => {}
        }
        let mut shortcuts = Shortcuts::ALL;
        for word in text.split(',') {
            match word.trim() {
                "sparsity" => shortcuts.sparsity = false,
                "head" => shortcuts.head = false,
                "prefix" => shortcuts.prefix = false,
                "speculation" => shortcuts.speculation = false,
                other => return Err(UnknownShortcut(other.escape_debug().to_string())),
            }
        }
        Ok(shortcuts)
    }
}

/// How much work shortcuts have saved since a backend was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShortcutCounts {
    /// Rows of `up` matrices that the sparse path looked at, one count per token.
    pub up_rows: u64,
    /// Of those, rows that met a zero gate and were skipped.
    pub up_rows_skipped: u64,
    /// Columns of `down` matrices that the sparse path looked at, one count per token.
    pub down_columns: u64,
    /// Of those, columns that met a zero input and were skipped.
    pub down_columns_skipped: u64,
    /// Rows of the output head that were screened, one count per token.
    pub head_rows: u64,
    /// Of those, rows that could still win and were computed in full.
    pub head_rows_rescored: u64,
}

/// What was counted since an earlier reading.
impl Sub for ShortcutCounts {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        ShortcutCounts {
            up_rows: self.up_rows - earlier.up_rows,
            up_rows_skipped: self.up_rows_skipped - earlier.up_rows_skipped,
            down_columns: self.down_columns - earlier.down_columns,
            down_columns_skipped: self.down_columns_skipped - earlier.down_columns_skipped,
            head_rows: self.head_rows - earlier.head_rows,
            head_rows_rescored: self.head_rows_rescored - earlier.head_rows_rescored,
        }
    }
}

impl Sum for ShortcutCounts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(ShortcutCounts::default(), |sum, more| ShortcutCounts {
            up_rows: sum.up_rows + more.up_rows,
            up_rows_skipped: sum.up_rows_skipped + more.up_rows_skipped,
            down_columns: sum.down_columns + more.down_columns,
            down_columns_skipped: sum.down_columns_skipped + more.down_columns_skipped,
            head_rows: sum.head_rows + more.head_rows,
            head_rows_rescored: sum.head_rows_rescored + more.head_rows_rescored,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_what_is_turned_off() {
        assert_eq!("".parse(), Ok(Shortcuts::ALL));
        assert_eq!("off".parse(), Ok(Shortcuts::NONE));
        assert_eq!("head".parse(), Ok(Shortcuts { head: false, ..Shortcuts::ALL }));
        assert_eq!("speculation".parse(), Ok(Shortcuts { speculation: false, ..Shortcuts::ALL }));
        assert_eq!("head, sparsity,prefix,speculation".parse(), Ok(Shortcuts::NONE));
        let error = "head,magic".parse::<Shortcuts>().unwrap_err().to_string();
        assert!(error.contains("`magic` in BITNET_SHORTCUTS"), "{error}");
    }
}
