//! VM types by name.

use anyhow::{Result, bail};

/// `KVM_X86_*_VM`, in order of their numbers.
pub(crate) const NAMES: [&str; 6] = ["default", "sw-protected", "sev", "sev-es", "snp", "tdx"];

/// The mask of a list such as `sw-protected,default`, of types that gmem provides, by name or number.
pub(crate) fn parse_mask(text: &str) -> Result<u32> {
    let provided = || names(gmem_uapi::Config::TYPES).join(", ");
    let mut mask = 0;
    for name in text.split(',').map(str::trim) {
        let by_name = NAMES.iter().position(|known| *known == name).and_then(|number| u32::try_from(number).ok());
        let number = by_name.or_else(|| name.parse().ok()).filter(|number| (*number as usize) < NAMES.len());
        match number {
            Some(number) if gmem_uapi::Config::TYPES & 1 << number != 0 => mask |= 1 << number,
            Some(number) => {
                bail!(
                    "--types: gmem run does not provide VM type {} yet; there are {}",
                    NAMES[number as usize],
                    provided()
                )
            }
            None if name.is_empty() => bail!("--types: a name is missing; there are {}", provided()),
            None => bail!("--types: no VM type {name:?}; there are {}", provided()),
        }
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
        for (wrong, word) in [("tdy", "tdy"), ("tdx", "yet"), ("", "missing"), ("default,", "missing"), ("6", "\"6\"")]
        {
            let error = parse_mask(wrong).unwrap_err().to_string();
            assert!(error.contains(word) && error.ends_with("there are default, sw-protected"), "{error}");
        }
        assert_eq!(names(0b10), ["sw-protected"]);
    }
}
