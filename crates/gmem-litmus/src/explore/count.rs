//! How many interleavings there are, and whether some state leads to no end.

use super::Graph;

/// Bytes for each state while [`paths`] runs.
pub(super) const BYTES: usize = size_of::<u128>() + 3 * size_of::<u32>() + size_of::<(u32, u32)>();

/// For each state the number of ways that lead to it from the first one, loops not counted.
pub(super) fn paths(graph: &Graph) -> Vec<u128> {
    let order = topological(graph);
    let mut paths = vec![0u128; graph.len()];
    let mut place = vec![0u32; graph.len()];
    for (at, nth) in order.iter().zip(0u32..) {
        place[*at as usize] = nth;
    }
    if let Some(first) = paths.first_mut() {
        *first = 1;
    }
    for &at in &order {
        let (here, at) = (paths[at as usize], at as usize);
        for &to in graph.successors(at) {
            if place[to as usize] > place[at] {
                paths[to as usize] = paths[to as usize].saturating_add(here);
            }
        }
    }
    paths
}

/// The states, each before its successors but for edges that close a loop.
fn topological(graph: &Graph) -> Vec<u32> {
    let mut order = Vec::with_capacity(graph.len());
    let mut visited = vec![false; graph.len()];
    let mut stack: Vec<(u32, u32)> = Vec::new();
    if let Some(first) = visited.first_mut() {
        *first = true;
        stack.push((0, 0));
    }
    while let Some((at, child)) = stack.last_mut() {
        match graph.successors(*at as usize).get(*child as usize) {
            Some(&to) => {
                *child += 1;
                if !std::mem::replace(&mut visited[to as usize], true) {
                    stack.push((to, 0));
                }
            }
            None => {
                order.push(*at);
                stack.pop();
            }
        }
    }
    order.reverse();
    order
}

/// The first state from which none of `ends` can be reached.
pub(super) fn without_end(graph: &Graph, ends: impl Iterator<Item = usize>) -> Option<usize> {
    let mut reaches = vec![false; graph.len()];
    for at in ends {
        reaches[at] = true;
    }
    let mut changed = true;
    while changed {
        changed = false;
        for at in (0..graph.closed()).rev() {
            if !reaches[at] && graph.successors(at).iter().any(|to| reaches[*to as usize]) {
                reaches[at] = true;
                changed = true;
            }
        }
    }
    (0..graph.closed()).find(|at| !reaches[*at])
}
