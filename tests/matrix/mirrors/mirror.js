// A mirror on node; README.md says what it does. Usage: node mirror.js tcp|http PORT [greets] [CERTIFICATE KEY].
'use strict';
const fs = require('fs');
const http = require('http');
const net = require('net');
const tls = require('tls');

const PIECES = [1, 7, 100, 1460, 4096, 16384, 65536, 3];
const BLOCK = Buffer.alloc(65521);
for (let i = 0, x = 1; i < BLOCK.length; i++) {
  x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
  BLOCK[i] = x >>> 24;
}

const [kind, port, ...rest] = process.argv.slice(2);
const greets = rest[0] === 'greets';

function pattern(at, size) {
  const made = Buffer.alloc(size);
  for (let done = 0; done < size;) {
    done += BLOCK.copy(made, done, (at + done) % BLOCK.length);
  }
  return made;
}

const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

async function push(to, size) {
  for (let sent = 0, n = 0; sent < size; n++) {
    const data = pattern(sent, Math.min(PIECES[n % 8], size - sent));
    sent += data.length;
    if (!to.write(data)) await new Promise((done) => to.once('drain', done));
    if (n % 8 === 7) await pause(1);
  }
  to.end();
}

function mirror(socket) {
  let head = Buffer.alloc(0), mode = null, taken = 0, good = 1;
  socket.on('error', () => socket.destroy());
  if (greets) socket.write('hello\n');
  const accept = (data) => {
    if (mode === '@echo' && data.length && !socket.write(data)) {
      socket.pause();
      socket.once('drain', () => socket.resume());
    } else if (mode === '@take') {
      if (!data.equals(pattern(taken, data.length))) good = 0;
      taken += data.length;
    }
  };
  socket.on('data', (data) => {
    if (mode !== null) return accept(data);
    head = Buffer.concat([head, data]);
    const end = head.indexOf('\n');
    if (end < 0) return;
    const [name, size] = head.subarray(0, end).toString().split(' ');
    mode = name;
    if (mode === '@push') push(socket, Number(size));
    if (mode === '@take') socket.write('take\n');
    accept(head.subarray(end + 1));
  });
  socket.on('end', () => {
    if (mode === '@take') socket.write(`took ${taken} ${good}\n`);
    if (mode !== '@push') socket.end();
  });
}

function answer(request, response) {
  response.on('error', () => response.destroy());
  if (request.url.startsWith('/push')) {
    request.resume();
    push(response, Number(request.url.split('?')[1]));
  } else {
    const body = [];
    request.on('data', (data) => body.push(data));
    request.on('end', () => response.end(Buffer.concat(body)));
  }
}

if (kind === 'http') {
  http.createServer(answer).listen(Number(port), '0.0.0.0');
} else if (rest.length === 2) {
  const files = { cert: fs.readFileSync(rest[0]), key: fs.readFileSync(rest[1]) };
  tls.createServer({ ...files, allowHalfOpen: true }, mirror).listen(Number(port), '0.0.0.0');
} else {
  net.createServer({ allowHalfOpen: true }, mirror).listen(Number(port), '0.0.0.0');
}
