//! What a guest's memory looks like, one character per page.

use std::fmt::Write;

/// What a guest finds at a page, as far as private memory is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Page {
    /// No memory slot: an access would be a device's.
    NoSlot,
    /// The VMM's own page.
    Shared,
    /// Private, and the file has no memory for it yet, or no longer.
    Hole,
    /// Private, with memory.
    Private,
    /// Private, and nothing can back it: an access ends in KVM_EXIT_MEMORY_FAULT.
    Fault,
}

impl Page {
    const ALL: [Self; 5] = [Self::Shared, Self::Private, Self::Hole, Self::Fault, Self::NoSlot];

    fn letter(self) -> char {
        match self {
            Self::NoSlot => '.',
            Self::Shared => 's',
            Self::Hole => 'o',
            Self::Private => 'P',
            Self::Fault => '!',
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::NoSlot => "no slot",
            Self::Shared => "shared",
            Self::Hole => "private, without memory",
            Self::Private => "private",
            Self::Fault => "an access faults",
        }
    }

    /// Parameter of the escape sequence that sets the colour.
    fn colour(self) -> &'static str {
        match self {
            Self::NoSlot => "2",
            Self::Shared => "32",
            Self::Hole => "34",
            Self::Private => "35",
            Self::Fault => "1;31",
        }
    }
}

/// Whether escape sequences may be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Paint {
    /// Text alone.
    Plain,
    /// Colours.
    Colour,
}

impl Paint {
    /// `text` in the colour of this escape parameter.
    pub(super) fn paint(self, colour: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colour => format!("\x1b[{colour}m{text}\x1b[0m"),
        }
    }
}

/// The pages of both slots of the tour.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Map(pub(super) Vec<Vec<Page>>);

impl Map {
    /// One character per page, a space between slots.
    pub(super) fn draw(&self, paint: Paint) -> String {
        let slots = self.0.iter().map(|pages| draw_slot(pages, paint));
        slots.collect::<Vec<_>>().join(" ")
    }
}

/// Neighbours of one kind are one piece of text: fewer escape sequences.
fn draw_slot(pages: &[Page], paint: Paint) -> String {
    let mut text = String::new();
    for run in pages.chunk_by(|a, b| a == b) {
        let letters: String = run.iter().map(|page| page.letter()).collect();
        text += &paint.paint(run[0].colour(), &letters);
    }
    text
}

/// What the characters mean.
pub(super) fn legend(paint: Paint) -> String {
    let mut text = String::new();
    for page in Page::ALL {
        let letter = paint.paint(page.colour(), &page.letter().to_string());
        let _ = write!(text, "  {letter} {}", page.meaning());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_have_one_character_per_page() {
        let map = Map(vec![vec![Page::Private, Page::Hole, Page::Hole, Page::Shared], vec![Page::Fault, Page::NoSlot]]);
        assert_eq!(map.draw(Paint::Plain), "Poos !.");
        let coloured = map.draw(Paint::Colour);
        assert_eq!(coloured.matches("\x1b[0m").count(), 5, "{coloured:?}");
        assert!(coloured.contains("\x1b[34moo\x1b[0m"), "{coloured:?}");
    }

    #[test]
    fn every_page_has_a_letter_of_its_own_in_the_legend() {
        let letters: std::collections::BTreeSet<char> = Page::ALL.iter().map(|page| page.letter()).collect();
        assert_eq!(letters.len(), Page::ALL.len());
        let legend = legend(Paint::Plain);
        assert!(Page::ALL.iter().all(|page| legend.contains(&format!(" {} {}", page.letter(), page.meaning()))));
    }
}
