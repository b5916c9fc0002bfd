//! [`Secret<T>`]: a value that is wiped when dropped, and that cannot be logged, copied or compared.

use zeroize::Zeroize;

/// A secret that is wiped when it is dropped.
///
/// It implements no `Debug`, `Display`, `Clone`, `Serialize`, `PartialEq` or `Deref`: a secret cannot reach a log line, an
/// error, a second place in memory or a comparison by accident. [`Secret::expose`] is the only access to the value, so
/// that every use can be found by searching for that word.
pub struct Secret<T: Zeroize>(T);

impl<T: Zeroize> Secret<T> {
    /// Takes ownership of the value. The caller must not retain a copy.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, for the moment of its use. A comment at the use should justify it.
    pub const fn expose(&self) -> &T {
        &self.0
    }

    /// The value, for filling it in place (reading a file, receiving a frame).
    pub const fn expose_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Zeroize> Drop for Secret<T> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Secret bytes: keys, PINs, packages that contain keys.
pub type SecretBytes = Secret<Vec<u8>>;

impl SecretBytes {
    /// Copies bytes whose owner wipes the original.
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self::new(bytes.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ZeroizeProbe<'a>(&'a std::cell::Cell<bool>);
    impl Zeroize for ZeroizeProbe<'_> {
        fn zeroize(&mut self) {
            self.0.set(true);
        }
    }

    #[test]
    fn secret_is_wiped_when_dropped() {
        let wiped = std::cell::Cell::new(false);
        drop(Secret::new(ZeroizeProbe(&wiped)));
        assert!(wiped.get());
    }

    /// `Secret<Vec<u8>>` must implement none of these traits; the blanket impl would make the call ambiguous.
    #[test]
    fn secret_implements_no_debug_clone_or_comparison() {
        trait Silent<Marker> {
            fn ok() {}
        }
        struct Debugs;
        struct Clones;
        struct Compares;
        impl<T: ?Sized> Silent<()> for T {}
        impl<T: std::fmt::Debug> Silent<Debugs> for T {}
        impl<T: Clone> Silent<Clones> for T {}
        impl<T: PartialEq> Silent<Compares> for T {}
        <SecretBytes as Silent<_>>::ok();
    }
}
