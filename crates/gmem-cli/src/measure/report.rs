//! How every measurement is printed.

use std::io::Write;

use anyhow::Result;
use base64::Engine as _;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

/// How to print a measurement.
#[derive(Args, Debug, Default)]
pub(crate) struct OutputArgs {
    /// Form of the measurement.
    #[arg(long, value_enum, default_value_t)]
    output_format: Format,
    /// Print a sentence around the measurement.
    #[arg(short, long)]
    verbose: bool,
    /// Print an object: `mode`, `measurement`, and with --explain `steps`.
    #[arg(long)]
    json: bool,
    /// Print every measured page or step with the digest after it, then the measurement.
    #[arg(long)]
    explain: bool,
}

/// Encodings of a measurement.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    #[default]
    Hex,
    Base64,
}

/// Prints steps as they come, or keeps them for the object.
pub(crate) struct Report<'a, W> {
    mode: &'static str,
    output: &'a OutputArgs,
    steps: Vec<Value>,
    to: W,
    written: std::io::Result<()>,
}

impl<'a, W: Write> Report<'a, W> {
    pub(crate) const fn new(mode: &'static str, output: &'a OutputArgs, to: W) -> Self {
        Self { mode, output, steps: Vec::new(), to, written: Ok(()) }
    }

    /// One step: what it was, in words and as fields, and the digest after it.
    pub(crate) fn step(&mut self, digest: &[u8], words: impl FnOnce() -> String, fields: impl FnOnce() -> Value) {
        if self.output.explain && self.output.json {
            let mut step = fields();
            step["digest_after"] = hex(digest).into();
            self.steps.push(step);
        } else if self.output.explain && self.written.is_ok() {
            self.written = writeln!(self.to, "{} {}", words(), hex(digest));
        }
    }

    /// The measurement itself.
    ///
    /// # Errors
    /// This or a step could not be written.
    pub(crate) fn finish(mut self, digest: &[u8]) -> Result<()> {
        self.written?;
        let measurement = match self.output.output_format {
            Format::Hex => hex(digest),
            Format::Base64 => base64::engine::general_purpose::STANDARD.encode(digest),
        };
        if self.output.json {
            let mut object = json!({"mode": self.mode, "measurement": measurement});
            if self.output.explain {
                object["steps"] = self.steps.into();
            }
            writeln!(self.to, "{object:#}")?;
        } else if self.output.verbose {
            writeln!(self.to, "Calculated {} guest measurement: {measurement}", self.mode)?;
        } else {
            writeln!(self.to, "{measurement}")?;
        }
        Ok(self.to.flush()?)
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Standard output, buffered.
pub(crate) fn stdout() -> impl Write {
    std::io::BufWriter::new(std::io::stdout().lock())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(output: &OutputArgs) -> String {
        let mut text = Vec::new();
        let mut report = Report::new("TEST", output, &mut text);
        report.step(&[1], || "page".into(), || json!({"gpa": "0x0"}));
        report.finish(&[0xab, 0xcd]).unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn each_form_has_the_measurement() {
        assert_eq!(print(&OutputArgs::default()), "abcd\n");
        assert_eq!(print(&OutputArgs { output_format: Format::Base64, ..Default::default() }), "q80=\n");
        let verbose = OutputArgs { verbose: true, ..Default::default() };
        assert_eq!(print(&verbose), "Calculated TEST guest measurement: abcd\n");
        assert_eq!(print(&OutputArgs { explain: true, ..Default::default() }), "page 01\nabcd\n");
        let object: Value =
            serde_json::from_str(&print(&OutputArgs { explain: true, json: true, ..Default::default() })).unwrap();
        let steps = json!([{"gpa": "0x0", "digest_after": "01"}]);
        assert_eq!(object, json!({"mode": "TEST", "measurement": "abcd", "steps": steps}));
    }
}
