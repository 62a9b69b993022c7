//! What is observed: contents of pages, and how operations end.

use gmem_core::vendor::Side;

/// What a page holds, seen by someone who is allowed to see it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Value {
    /// Zeros.
    Zero,
    /// Bytes of whoever had the memory before, or has it now.
    Foreign,
    /// Bytes that nobody wrote: another key, or never initialised.
    Scrambled,
    /// A value that the program names, by its place in [`Program::values`](crate::Program).
    Named(u8),
}

/// How one operation of a program ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Seen {
    /// It has not ended, or was never reached.
    Nothing,
    /// It succeeded and has nothing to tell.
    Ok,
    /// It read this.
    Value(Value),
    /// It did this many pages of more.
    Partly(u8),
    /// The vCPU left with a memory-fault exit that names this side.
    Exit(Side),
    /// The vCPU left for the VMM to emulate the access.
    Mmio,
    /// A call failed, or KVM_RUN did, with this errno.
    Errno(Errno),
    /// The VM is dead.
    Dead,
    /// The guest took an exception that it does not survive.
    Exception,
    /// The guest stopped at an address that the host cannot resolve.
    Abort,
    /// The guest faults at the same place for ever.
    Stuck,
    /// The access took a signal or a fault in the host.
    HostFault,
    /// The host read bytes that say nothing of the guest's.
    Cipher,
    /// The access was refused because someone else has the page.
    Busy,
}

macro_rules! errnos {
    ($($name:ident),*) => {
        /// Error numbers of Linux that a program can name.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Errno { $(#[doc = concat!("`", stringify!($name), "`")] $name),* }

        impl Errno {
            pub(crate) const ALL: &'static [(&'static str, Self)] = &[$((stringify!($name), Self::$name)),*];

            pub(crate) fn name(self) -> &'static str {
                Self::ALL.iter().find(|(_, errno)| *errno == self).map_or("", |(name, _)| name)
            }
        }
    };
}

errnos!(
    EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EHWPOISON, EINTR, EINVAL, EIO, ENOENT, ENOMEM, ENOTTY, ENXIO, EOPNOTSUPP,
    EPERM, ETXTBSY
);

/// Words for results that carry nothing.
const WORDS: &[(&str, Seen)] = &[
    ("ok", Seen::Ok),
    ("zero", Seen::Value(Value::Zero)),
    ("foreign", Seen::Value(Value::Foreign)),
    ("scrambled", Seen::Value(Value::Scrambled)),
    ("exit-private", Seen::Exit(Side::Private)),
    ("exit-shared", Seen::Exit(Side::Shared)),
    ("mmio", Seen::Mmio),
    ("dead", Seen::Dead),
    ("exception", Seen::Exception),
    ("abort", Seen::Abort),
    ("stuck", Seen::Stuck),
    ("fault", Seen::HostFault),
    ("cipher", Seen::Cipher),
    ("busy", Seen::Busy),
    ("nothing", Seen::Nothing),
];

impl Seen {
    /// The word that a program uses for this result.
    #[must_use]
    pub fn word(self, values: &[String]) -> String {
        match self {
            Self::Value(Value::Named(n)) => values.get(usize::from(n)).cloned().unwrap_or_default(),
            Self::Partly(pages) => format!("partly-{pages}"),
            Self::Errno(errno) => errno.name().to_owned(),
            plain => WORDS.iter().find(|(_, seen)| *seen == plain).map_or("", |(word, _)| word).to_owned(),
        }
    }

    /// The result that `word` stands for, unless it is a value that the program names.
    pub(crate) fn of_word(word: &str) -> Option<Self> {
        if let Some(pages) = word.strip_prefix("partly-") {
            return pages.parse().ok().map(Self::Partly);
        }
        let errno = Errno::ALL.iter().find(|(name, _)| *name == word).map(|(_, errno)| Self::Errno(*errno));
        errno.or_else(|| WORDS.iter().find(|(name, _)| *name == word).map(|(_, seen)| *seen))
    }

    pub(crate) fn all_words() -> impl Iterator<Item = &'static str> {
        WORDS.iter().map(|(word, _)| *word)
    }

    /// Words that a program can compare with, for error messages.
    pub(crate) fn words() -> String {
        let words = WORDS.iter().map(|(word, _)| *word);
        words.chain(["partly-N", "an errno"]).collect::<Vec<_>>().join(", ")
    }

    /// Whether a vCPU runs on after an access that ended like this.
    pub(crate) fn guest_goes_on(self) -> bool {
        matches!(self, Self::Ok | Self::Value(_))
    }
}
