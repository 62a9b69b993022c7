//! VM types by name.

use anyhow::{Context, Result, bail};

/// `KVM_X86_*_VM`, in order of their numbers.
pub(crate) const NAMES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];

/// The number of a type given by name or number.
pub(crate) fn parse(text: &str) -> Result<u32> {
    let by_name = NAMES.iter().position(|name| *name == text).and_then(|number| u32::try_from(number).ok());
    let number = by_name.or_else(|| text.parse().ok());
    let number = number.filter(|number| *number < 6);
    number.with_context(|| format!("no VM type {text:?}; there are {}", NAMES.join(", ")))
}

/// The mask of a list such as `sw-protected,default`, of types that gmem provides.
pub(crate) fn parse_mask(text: &str) -> Result<u32> {
    let mut mask = 0;
    for name in text.split(',') {
        let number = parse(name.trim())?;
        if gmem_uapi::Config::TYPES & 1 << number == 0 {
            bail!("gmem does not provide VM type {} yet", NAMES[number as usize]);
        }
        mask |= 1 << number;
    }
    Ok(mask)
}

/// The names of the types in a mask.
pub(crate) fn names(mask: u32) -> Vec<&'static str> {
    let named = NAMES.iter().enumerate().filter(|(number, _)| mask & 1 << number != 0);
    named.map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_have_names_and_numbers() {
        assert_eq!(parse_mask("sw-protected,0").unwrap(), 0b11);
        assert!(parse("tdy").unwrap_err().to_string().contains("sw-protected"));
        assert!(parse_mask("tdx").unwrap_err().to_string().contains("tdx"));
        assert_eq!(names(0b10), ["sw-protected"]);
    }
}
