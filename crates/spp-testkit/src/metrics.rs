//! The metrics page, read over plain HTTP.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::site::Site;

/// A site that is to tell its metrics on that address.
pub fn told_on(address: &str) -> Site {
    let site = Site::new();
    site.edit("sppd.toml", "# metrics = \"127.0.0.1:7446\"", &format!("metrics = \"{address}\""));
    site
}

/// A connection to the metrics listener.
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

/// The whole answer to a request.
pub fn ask(port: u16, request: &str) -> String {
    let mut stream = connect(port);
    write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
