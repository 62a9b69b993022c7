//! What has to be known of a program before it is run.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

/// How a program is started.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By the dynamic linker at this path.
    Dynamic(PathBuf),
    /// By the kernel alone: no library can be put in front of it.
    Static,
    /// A script of this interpreter, which gets the rest of the first line as one argument.
    Script { interpreter: PathBuf, argument: String },
    /// For another machine, or no program.
    Foreign,
}

/// Bytes that hold the header, the program headers and the interpreter's name: of nearly every program, and of any real one.
const HEADS: [u64; 2] = [1 << 12, 1 << 16];

/// Looks into `path`.
pub(crate) fn kind(path: &Path) -> std::io::Result<Kind> {
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    for size in HEADS {
        let more = size - head.len() as u64;
        head.reserve_exact(usize::try_from(more).unwrap_or(0));
        file.by_ref().take(more).read_to_end(&mut head)?;
        match kind_of(&head) {
            Kind::Foreign => {}
            kind => return Ok(kind),
        }
    }
    Ok(Kind::Foreign)
}

fn kind_of(head: &[u8]) -> Kind {
    if let Some(rest) = head.strip_prefix(b"#!") {
        return script(rest);
    }
    dynamic_linker(head).unwrap_or(Kind::Foreign)
}

fn script(rest: &[u8]) -> Kind {
    let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let line = line.trim();
    let (interpreter, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    match interpreter {
        "" => Kind::Foreign,
        name => Kind::Script { interpreter: name.into(), argument: argument.trim().to_owned() },
    }
}

fn dynamic_linker(head: &[u8]) -> Option<Kind> {
    let header = FileHeader64::<object::Endianness>::parse(head).ok()?;
    let endian = header.endian().ok()?;
    if header.e_machine(endian) != EM_X86_64 {
        return None;
    }
    let segments = header.program_headers(endian, head).ok()?;
    let Some(segment) = segments.iter().find(|segment| segment.p_type(endian) == PT_INTERP) else {
        return Some(Kind::Static);
    };
    let name = segment.data(endian, head).ok()?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some(Kind::Dynamic(PathBuf::from(String::from_utf8_lossy(name).into_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_apart() {
        let own = kind(Path::new("/proc/self/exe")).unwrap();
        assert!(matches!(own, Kind::Dynamic(linker) if linker.to_string_lossy().contains("ld-linux")));
        let script = |interpreter: &str, argument: &str| Kind::Script {
            interpreter: interpreter.into(),
            argument: argument.to_owned(),
        };
        assert_eq!(kind_of(b"#! /bin/sh -e\n"), script("/bin/sh", "-e"));
        assert_eq!(kind_of(b"#!/usr/bin/env  -S a b \nexit"), script("/usr/bin/env", "-S a b"));
        assert_eq!(kind_of(b"#!"), Kind::Foreign);
        assert_eq!(kind_of(b"\x7fELF\x02\x01\x01"), Kind::Foreign);
        assert_eq!(kind_of(b""), Kind::Foreign);
    }
}
