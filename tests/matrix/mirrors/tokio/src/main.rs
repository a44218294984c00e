//! A mirror on tokio; ../README.md says what it does. Usage: mirror PORT [greets].

use std::io::Result;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

const PIECES: [usize; 8] = [1, 7, 100, 1460, 4096, 16384, 65536, 3];

fn make_block() -> Vec<u8> {
    let mut x: u32 = 1;
    (0..65521)
        .map(|_| {
            x = x.wrapping_mul(1664525).wrapping_add(1013904223);
            (x >> 24) as u8
        })
        .collect()
}

fn pattern(block: &[u8], at: usize, size: usize) -> Vec<u8> {
    block.iter().cycle().skip(at % block.len()).take(size).copied().collect()
}

async fn mirror(stream: TcpStream, greets: bool) -> Result<()> {
    let block = make_block();
    let (reading, mut writing) = stream.into_split();
    let mut reading = BufReader::new(reading);
    if greets {
        writing.write_all(b"hello\n").await?;
    }
    let mut line = String::new();
    reading.read_line(&mut line).await?;
    let mut words = line.split_whitespace();
    let mode = words.next().unwrap_or("");
    let size: usize = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let mut buffer = vec![0u8; 65536];
    if mode == "@echo" {
        loop {
            let got = reading.read(&mut buffer).await?;
            if got == 0 {
                break;
            }
            writing.write_all(&buffer[..got]).await?;
        }
    } else if mode == "@push" {
        let (mut sent, mut pieces) = (0, 0);
        while sent < size {
            let piece = PIECES[pieces % 8].min(size - sent);
            writing.write_all(&pattern(&block, sent, piece)).await?;
            sent += piece;
            pieces += 1;
            if pieces % 8 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    } else if mode == "@take" {
        writing.write_all(b"take\n").await?;
        let (mut taken, mut good) = (0, 1);
        loop {
            let got = reading.read(&mut buffer).await?;
            if got == 0 {
                break;
            }
            if buffer[..got] != pattern(&block, taken, got)[..] {
                good = 0;
            }
            taken += got;
        }
        writing.write_all(format!("took {} {}\n", taken, good).as_bytes()).await?;
    }
    writing.shutdown().await?;
    while reading.read(&mut buffer).await? > 0 {}
    Ok(())
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let greets = arguments.len() > 2;
    let listener = TcpListener::bind(("0.0.0.0", arguments[1].parse().unwrap())).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(mirror(stream, greets));
    }
}
