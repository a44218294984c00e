import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.Arrays;
import java.util.Random;
import java.util.concurrent.CompletableFuture;

/** The client of an HTTP mirror on the JDK's HttpClient: bodies of all sizes, whole and in pieces. Calls HOST PORT SEED SIZE. */
public class Calls {
    private static final int CLIENTS = 4, SMALL = 15;

    private final HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final String where;
    private final Random dice;
    private long moved;

    Calls(String where, long seed) {
        this.where = where;
        dice = new Random(seed);
    }

    private byte[] made(int size) {
        byte[] data = new byte[size];
        dice.nextBytes(data);
        return data;
    }

    private static byte[] pattern(int size) {
        byte[] made = new byte[size];
        for (int i = 0, x = 1; i < size; i++) {
            x = i % 65521 == 0 ? 1 : x;
            x = x * 1664525 + 1013904223;
            made[i] = (byte) (x >>> 24);
        }
        return made;
    }

    private void ask(HttpRequest.Builder request, String path, byte[] wanted) throws Exception {
        // the Service's name is what the client's proxy routes by
        request.uri(URI.create(where + path)).header("Host", "server").timeout(Duration.ofMinutes(1));
        HttpResponse<byte[]> response = client.send(request.build(), BodyHandlers.ofByteArray());
        if (response.statusCode() != 200) {
            throw new IllegalStateException("status " + response.statusCode());
        }
        if (!Arrays.equals(response.body(), wanted)) {
            throw new AssertionError("wanted " + wanted.length + " bytes, got " + response.body().length + ", which are others");
        }
        moved += wanted.length;
    }

    private void echo(byte[] data) throws Exception {
        ask(HttpRequest.newBuilder().POST(BodyPublishers.ofByteArray(data)), "/echo", data);
    }

    /** In pieces, as this stream has never much; its length is told to nobody. */
    private void dribble(byte[] data) throws Exception {
        InputStream pieces = new ByteArrayInputStream(data) {
            @Override
            public synchronized int read(byte[] to, int at, int size) {
                if (dice.nextInt(10) == 0) {
                    try {
                        Thread.sleep(1);
                    } catch (InterruptedException error) {
                        throw new IllegalStateException(error);
                    }
                }
                return super.read(to, at, Math.min(size, 1 << dice.nextInt(16)));
            }
        };
        ask(HttpRequest.newBuilder().POST(BodyPublishers.ofInputStream(() -> pieces)), "/echo", data);
    }

    private long run(int size) {
        try {
            for (int n = 0; n < SMALL; n++) {
                echo(made(1 + dice.nextInt(1 << dice.nextInt(15))));
            }
            dribble(made(size / 8));
            ask(HttpRequest.newBuilder().GET(), "/push?" + size / 2, pattern(size / 2));
            echo(made(size / 2));
        } catch (Exception error) {
            throw new IllegalStateException(error);
        }
        return moved;
    }

    public static void main(String[] arguments) {
        String where = "http://" + arguments[0] + ":" + arguments[1];
        long seed = Long.parseLong(arguments[2]);
        int size = Integer.parseInt(arguments[3]);
        CompletableFuture<?>[] all = new CompletableFuture<?>[CLIENTS];
        for (int n = 0; n < CLIENTS; n++) {
            Calls calls = new Calls(where, seed * CLIENTS + n);
            all[n] = CompletableFuture.supplyAsync(() -> calls.run(size), task -> new Thread(task).start());
        }
        long sum = 0;
        for (CompletableFuture<?> each : all) {
            sum += (Long) each.join();
        }
        System.out.println("{\"bytes\": " + sum + "}");
        System.exit(0);
    }
}
