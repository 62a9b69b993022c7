//! How results are written. A line has nothing in it that two runs of the same kernel may disagree about: no addresses,
//! descriptors, inode numbers, process ids or times.

use std::fmt::{self, Write as _};

use crate::machine::Exit;
use crate::sys::Sys;

/// `ok`, `ok N` for a value other than 0, or the errno's name.
pub(crate) fn result(outcome: Sys<i64>) -> String {
    match outcome {
        Ok(0) => "ok".into(),
        Ok(value) => format!("ok {value}"),
        Err(errno) => errno.to_string(),
    }
}

/// As [`result`] for a call whose value is a descriptor.
pub(crate) fn descriptor(outcome: Sys<i64>) -> String {
    result(outcome.map(|_| 0))
}

/// Bytes: a run of one value, a short string in hexadecimal, or a checksum.
pub(crate) fn bytes(bytes: &[u8]) -> String {
    match bytes {
        [] => "nothing".into(),
        [first, rest @ ..] if rest.iter().all(|b| b == first) => format!("{first:02x}*{}", bytes.len()),
        short if short.len() <= 16 => short.iter().fold(String::new(), |mut s, b| {
            let _ = write!(s, "{b:02x}");
            s
        }),
        long => format!("sum {:016x}", checksum(0, long)),
    }
}

/// FNV-1a continued from `state`.
pub(crate) fn checksum(state: u64, bytes: &[u8]) -> u64 {
    let start = if state == 0 { 0xcbf2_9ce4_8422_2325 } else { state };
    bytes.iter().fold(start, |sum, &b| (sum ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// The exits of one operation. Consecutive MMIO exits are folded into one entry with a count and a checksum.
#[derive(Debug, Default)]
pub(crate) struct Exits {
    done: Vec<String>,
    mmio: Option<Mmio>,
}

#[derive(Debug)]
struct Mmio {
    first: String,
    count: u64,
    sum: u64,
}

impl Exits {
    /// Adds an exit.
    pub(crate) fn push(&mut self, exit: Exit) {
        match exit {
            Exit::Mmio { write, gpa, len, data } => self.push_mmio(write, gpa, len, data),
            Exit::Port(_) => {}
            other => self.note(describe(other)),
        }
    }

    /// Adds what the client did in between.
    pub(crate) fn note(&mut self, text: String) {
        self.flush();
        self.done.push(text);
    }

    fn push_mmio(&mut self, write: bool, gpa: u64, len: u32, data: [u8; 8]) {
        let kind = if write { "write" } else { "read" };
        let first = || Mmio { first: format!("{kind} {gpa:#x}:{len}"), count: 0, sum: 0 };
        let mmio = self.mmio.get_or_insert_with(first);
        let used = if write { usize::try_from(len).unwrap_or(8).min(8) } else { 0 };
        mmio.count += 1;
        for part in [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &data[..used], &[u8::from(write)]] {
            mmio.sum = checksum(mmio.sum, part);
        }
    }

    fn flush(&mut self) {
        if let Some(Mmio { first, count, sum }) = self.mmio.take() {
            self.done.push(format!("mmio {first} x{count} sum {sum:016x}"));
        }
    }

    /// True if nothing but the end of the stub happened.
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty() && self.mmio.is_none()
    }
}

impl fmt::Display for Exits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.done.iter().try_for_each(|entry| write!(f, "[{entry}] "))
    }
}

/// The whole line's part after the arrow: exits, then the outcome.
pub(crate) fn guest(mut exits: Exits, outcome: &str) -> String {
    exits.flush();
    format!("{exits}{outcome}")
}

fn describe(exit: Exit) -> String {
    match exit {
        Exit::Port(port) => format!("port {port:#x}"),
        Exit::Mmio { gpa, .. } => format!("mmio {gpa:#x}"),
        Exit::Hypercall { nr, args: [a, b, c], ret } => format!("hypercall {nr} {a:#x} {b:#x} {c:#x} ret {ret}"),
        Exit::MemoryFault { errno, flags, gpa, size } => {
            format!("{errno} fault flags {flags:#x} gpa {gpa:#x} size {size:#x}")
        }
        Exit::Internal(suberror) => format!("internal error {suberror}"),
        Exit::Other(reason) => format!("exit {reason}"),
        Exit::Failed(errno, reason) => format!("{errno} exit {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Errno;

    #[test]
    fn results_have_names() {
        assert_eq!(result(Ok(0)), "ok");
        assert_eq!(result(Ok(3)), "ok 3");
        assert_eq!(descriptor(Ok(17)), "ok");
        assert_eq!(result(Err(Errno(libc::EEXIST))), "EEXIST");
        assert_eq!(result(Err(Errno(9999))), "errno9999");
    }

    #[test]
    fn bytes_are_short() {
        assert_eq!(bytes(&[7; 4096]), "07*4096");
        assert_eq!(bytes(&[1, 2]), "0102");
        assert!(bytes(&(0..=255).collect::<Vec<u8>>()).starts_with("sum "));
        assert_ne!(checksum(0, b"ab"), checksum(0, b"ba"));
    }

    #[test]
    fn mmio_exits_fold_and_keep_their_order() {
        let mut exits = Exits::default();
        let write = |gpa| Exit::Mmio { write: true, gpa, len: 8, data: [1; 8] };
        exits.push(write(0x1000));
        exits.push(write(0x1008));
        exits.note("between".into());
        exits.push(write(0x1010));
        let line = guest(exits, "done");
        assert!(line.starts_with("[mmio write 0x1000:8 x2 sum "), "{line}");
        assert!(line.contains("] [between] [mmio write 0x1010:8 x1 sum "), "{line}");
        assert!(line.ends_with("] done"), "{line}");
    }
}
