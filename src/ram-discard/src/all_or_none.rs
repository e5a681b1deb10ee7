//! What can be refused later is undone in reverse.

/// Does `apply` with each item in order. When one fails, `undo` is done with those before it, in
/// reverse; what the failing one had begun is its own to undo.
///
/// Both get `state`, which neither could have for itself while the other has it.
///
/// # Errors
///
/// That of the first item that fails.
///
/// ```
/// use ram_discard::try_all;
///
/// let mut mapped = Vec::new();
/// let map = |mapped: &mut Vec<u32>, page: u32| {
///     mapped.push(page);
///     if mapped.len() < 3 { Ok(()) } else { Err(format!("no room for {:?}", mapped.pop())) }
/// };
/// let unmap = |mapped: &mut Vec<u32>, page| assert_eq!(mapped.pop(), Some(page));
/// assert!(try_all(&mut mapped, [7, 8, 9, 10].into_iter(), map, unmap).is_err());
/// assert!(mapped.is_empty());
/// ```
pub fn try_all<S: ?Sized, I, E>(
    state: &mut S,
    items: I,
    mut apply: impl FnMut(&mut S, I::Item) -> Result<(), E>,
    mut undo: impl FnMut(&mut S, I::Item),
) -> Result<(), E>
where
    I: IntoIterator,
    I::IntoIter: Clone + DoubleEndedIterator + ExactSizeIterator,
{
    let items = items.into_iter();
    for (done, item) in items.clone().enumerate() {
        if let Err(error) = apply(state, item) {
            items.take(done).rev().for_each(|item| undo(state, item));
            return Err(error);
        }
    }
    Ok(())
}
