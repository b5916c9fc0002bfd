//! Empty: the module is a dependency.
