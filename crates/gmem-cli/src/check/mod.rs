//! `gmem check`: replays recorded facts against the models.
#![expect(dead_code, reason = "the subcommand that reads files and prints cases comes with the other architectures")]

pub(crate) mod snp;

pub(crate) mod tdx;

/// One fact of a vector file and what became of it.
#[derive(Debug)]
pub(crate) struct Case {
    /// Where in the file: a name, a row or a line.
    pub(crate) name: String,
    /// Both sides of a mismatch.
    pub(crate) outcome: Result<(), Mismatch>,
}

/// What a file says and what the model says.
#[derive(Debug)]
pub(crate) struct Mismatch {
    /// As recorded.
    pub(crate) expected: String,
    /// As modelled, or why the model cannot express the row.
    pub(crate) got: String,
}

impl Case {
    /// Compares what a file records with what a model answers.
    pub(crate) fn compare(name: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        let (name, expected, got) = (name.into(), expected.into(), got.into());
        let outcome = if expected == got { Ok(()) } else { Err(Mismatch { expected, got }) };
        Self { name, outcome }
    }
}
