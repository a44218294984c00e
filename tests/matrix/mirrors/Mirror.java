import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.concurrent.Executors;

/**
 * A mirror on Java's selectors, with sockets that do not block, and on the JDK's HTTP server. README.md says what it does.
 * Usage: java Mirror.java tcp|http PORT [greets].
 */
public class Mirror {
    private static final int[] PIECES = {1, 7, 100, 1460, 4096, 16384, 65536, 3};
    private static final byte[] BLOCK = new byte[65521];

    private static byte[] pattern(long at, int size) {
        byte[] made = new byte[size];
        for (int done = 0; done < size; ) {
            int from = (int) ((at + done) % BLOCK.length);
            int part = Math.min(size - done, BLOCK.length - from);
            System.arraycopy(BLOCK, from, made, done, part);
            done += part;
        }
        return made;
    }

    /** One connection. What is to be written waits in `out`; nothing is read to be echoed meanwhile. */
    private static final class Mirrored {
        private final SocketChannel channel;
        private final StringBuilder line = new StringBuilder();
        private ByteBuffer out = ByteBuffer.allocate(0);
        private String mode;
        private long size, moved, pieces, resumeAt;
        private boolean good = true, hasEnded, hasClosed;

        Mirrored(SocketChannel channel, boolean greets) {
            this.channel = channel;
            if (greets) {
                out = ByteBuffer.wrap("hello\n".getBytes(StandardCharsets.US_ASCII));
            }
        }

        int interest() {
            boolean pushes = "@push".equals(mode) && moved < size && System.nanoTime() >= resumeAt;
            if (out.hasRemaining() || pushes) {
                return SelectionKey.OP_WRITE;
            }
            return hasEnded ? 0 : SelectionKey.OP_READ;
        }

        /** False once the connection is over. */
        boolean step(ByteBuffer in) throws IOException {
            channel.write(out);
            if (!out.hasRemaining() && "@push".equals(mode) && moved < size && System.nanoTime() >= resumeAt) {
                int piece = (int) Math.min(PIECES[(int) (pieces % 8)], size - moved);
                out = ByteBuffer.wrap(pattern(moved, piece));
                moved += piece;
                if (++pieces % 8 == 0) {
                    resumeAt = System.nanoTime() + 1_000_000;
                }
            }
            if (!out.hasRemaining() && !hasEnded) {
                in.clear();
                int got = channel.read(in);
                in.flip();
                if (got < 0) {
                    end();
                } else {
                    accept(in);
                }
                channel.write(out);
            }
            boolean isDone = "@push".equals(mode) ? moved == size : hasEnded;
            if (isDone && !out.hasRemaining() && !hasClosed) {
                channel.shutdownOutput();
                hasClosed = true;
            }
            return !(hasClosed && hasEnded);
        }

        private void accept(ByteBuffer in) {
            while (mode == null && in.hasRemaining()) {
                char each = (char) in.get();
                if (each == '\n') {
                    String[] words = line.toString().split(" ");
                    mode = words[0];
                    size = Long.parseLong(words[1]);
                    if (mode.equals("@take")) {
                        out = ByteBuffer.wrap("take\n".getBytes(StandardCharsets.US_ASCII));
                    }
                } else {
                    line.append(each);
                }
            }
            byte[] data = new byte[in.remaining()];
            in.get(data);
            if ("@echo".equals(mode)) {
                out = ByteBuffer.wrap(data);
            } else if ("@take".equals(mode)) {
                good &= Arrays.equals(data, pattern(moved, data.length));
                moved += data.length;
            }
        }

        private void end() {
            hasEnded = true;
            if ("@take".equals(mode)) {
                String answer = "took " + moved + " " + (good ? 1 : 0) + "\n";
                out = ByteBuffer.wrap(answer.getBytes(StandardCharsets.US_ASCII));
            }
        }
    }

    private static void serve(int port, boolean greets) throws IOException {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open();
        listener.bind(new InetSocketAddress("0.0.0.0", port), 128);
        listener.configureBlocking(false);
        listener.register(selector, SelectionKey.OP_ACCEPT);
        ByteBuffer in = ByteBuffer.allocateDirect(65536);
        while (true) {
            selector.select(1); // a push that pauses is looked at again
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel channel = listener.accept();
                    channel.configureBlocking(false);
                    channel.register(selector, SelectionKey.OP_READ, new Mirrored(channel, greets));
                } else {
                    move(key, in);
                }
            }
            selector.selectedKeys().clear();
            for (SelectionKey key : selector.keys()) {
                if (key.isValid() && key.attachment() != null) {
                    key.interestOps(((Mirrored) key.attachment()).interest());
                }
            }
        }
    }

    private static void move(SelectionKey key, ByteBuffer in) throws IOException {
        Mirrored mirrored = (Mirrored) key.attachment();
        boolean goesOn = false;
        try {
            goesOn = mirrored.step(in);
        } catch (IOException error) {
            // the client has gone
        }
        if (!goesOn) {
            mirrored.channel.close();
        }
    }

    private static void answer(HttpExchange exchange) throws IOException {
        String path = exchange.getRequestURI().getPath();
        byte[] body = exchange.getRequestBody().readAllBytes();
        if (path.equals("/push")) {
            body = pattern(0, Integer.parseInt(exchange.getRequestURI().getQuery()));
        }
        exchange.sendResponseHeaders(200, body.length == 0 ? -1 : body.length);
        exchange.getResponseBody().write(body);
        exchange.close();
    }

    public static void main(String[] arguments) throws IOException {
        for (int i = 0, x = 1; i < BLOCK.length; i++) {
            x = x * 1664525 + 1013904223;
            BLOCK[i] = (byte) (x >>> 24);
        }
        int port = Integer.parseInt(arguments[1]);
        if (arguments[0].equals("http")) {
            HttpServer server = HttpServer.create(new InetSocketAddress("0.0.0.0", port), 128);
            server.createContext("/", Mirror::answer);
            server.setExecutor(Executors.newCachedThreadPool());
            server.start();
        } else {
            serve(port, arguments.length > 2);
        }
    }
}
