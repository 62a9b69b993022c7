//! Lines and words of a program.

use winnow::combinator::{alt, repeat};
use winnow::error::{ContextError, ErrMode};
use winnow::prelude::*;
use winnow::token::{any, take_while};

use super::ParseError;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind<'s> {
    /// A name or keyword. May hold `-` and `_`, and may begin with a digit (`2M`).
    Word(&'s str),
    Number(u64),
    /// Punctuation.
    Sign(&'s str),
    /// Anything else.
    Unknown(&'s str),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Token<'s> {
    pub(super) kind: Kind<'s>,
    start: usize,
    len: usize,
}

type Lexed<'s> = winnow::Result<Kind<'s>, ErrMode<ContextError>>;

fn sign<'s>(input: &mut &'s str) -> Lexed<'s> {
    alt(("..", "->", "=", ",", ":", "(", ")", ".")).map(Kind::Sign).parse_next(input)
}

/// A `-` belongs to a word only in its middle, so that `a->b` is three tokens.
fn word<'s>(input: &mut &'s str) -> Lexed<'s> {
    let part = (take_while(1.., |c: char| c.is_ascii_alphanumeric() || c == '_'),);
    let more = ('-', take_while(1.., |c: char| c.is_ascii_alphanumeric() || c == '_'));
    (part, repeat::<_, _, (), _, _>(0.., more)).take().map(number_or_word).parse_next(input)
}

fn number_or_word(text: &str) -> Kind<'_> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    number.map_or(Kind::Word(text), Kind::Number)
}

fn unknown<'s>(input: &mut &'s str) -> Lexed<'s> {
    any.take().map(Kind::Unknown).parse_next(input)
}

fn lex(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        if rest.is_empty() || rest.starts_with('#') {
            return tokens;
        }
        let start = text.len() - rest.len();
        let Ok(kind) = alt((sign, word, unknown)).parse_next(&mut rest) else { return tokens };
        tokens.push(Token { kind, start, len: text.len() - rest.len() - start });
    }
}

/// One line, read from left to right.
#[derive(Debug)]
pub(super) struct Line<'s> {
    pub(super) number: usize,
    pub(super) text: &'s str,
    tokens: Vec<Token<'s>>,
    at: usize,
}

impl<'s> Line<'s> {
    pub(super) fn new(number: usize, text: &'s str) -> Self {
        Self { number, text, tokens: lex(text), at: 0 }
    }

    pub(super) fn is_blank(&self) -> bool {
        self.tokens.is_empty()
    }

    pub(super) fn is_indented(&self) -> bool {
        self.text.starts_with([' ', '\t'])
    }

    /// The place of the next token, for [`Line::rewind`].
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn rewind(&mut self, position: usize) {
        self.at = position;
    }

    /// The text without a comment and outer spaces.
    pub(super) fn stripped(&self) -> &'s str {
        let start = self.tokens.first().map_or(0, |token| token.start);
        let end = self.tokens.last().map_or(start, |token| token.start + token.len);
        self.text.get(start..end).unwrap_or_default()
    }

    /// Everything after the next token, comments included: for free text.
    pub(super) fn rest(&self) -> &'s str {
        let start = self.at.checked_sub(1).and_then(|last| self.tokens.get(last)).map_or(0, |t| t.start + t.len);
        self.text.get(start..).unwrap_or_default().trim()
    }

    pub(super) fn peek(&self) -> Option<Kind<'s>> {
        self.tokens.get(self.at).map(|token| token.kind)
    }

    pub(super) fn next(&mut self) -> Option<Kind<'s>> {
        let kind = self.peek();
        self.at += usize::from(kind.is_some());
        kind
    }

    pub(super) fn error(&self, expected: impl Into<String>) -> ParseError {
        let token = self.tokens.get(self.at);
        let start = token.map_or_else(|| self.text.trim_end().len(), |token| token.start);
        let column = self.text.get(..start).map_or(0, |before| before.chars().count()) + 1;
        let found = token.and_then(|token| self.text.get(token.start..token.start + token.len));
        ParseError {
            line: self.number,
            column,
            expected: expected.into(),
            found: found.map_or_else(|| "the end of the line".into(), |found| format!("`{found}`")),
        }
    }

    /// The same error about the token before.
    pub(super) fn error_before(&mut self, expected: impl Into<String>) -> ParseError {
        self.at = self.at.saturating_sub(1);
        self.error(expected)
    }

    pub(super) fn sign(&mut self, sign: &str) -> Result<(), ParseError> {
        if self.eat_sign(sign) { Ok(()) } else { Err(self.error(format!("`{sign}`"))) }
    }

    pub(super) fn eat_sign(&mut self, sign: &str) -> bool {
        let found = self.peek() == Some(Kind::Sign(sign));
        self.at += usize::from(found);
        found
    }

    pub(super) fn eat_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(Kind::Word(word));
        self.at += usize::from(found);
        found
    }

    pub(super) fn word(&mut self, expected: &str) -> Result<&'s str, ParseError> {
        match self.peek() {
            Some(Kind::Word(word)) => {
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.error(expected)),
        }
    }

    pub(super) fn keyword(&mut self, word: &str) -> Result<(), ParseError> {
        if self.eat_word(word) { Ok(()) } else { Err(self.error(format!("`{word}`"))) }
    }

    pub(super) fn number(&mut self, expected: &str) -> Result<u64, ParseError> {
        match self.peek() {
            Some(Kind::Number(number)) => {
                self.at += 1;
                Ok(number)
            }
            _ => Err(self.error(expected)),
        }
    }

    pub(super) fn end(&self) -> Result<(), ParseError> {
        if self.peek().is_none() { Ok(()) } else { Err(self.error("the end of the line")) }
    }
}
