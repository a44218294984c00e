import java.io.DataInputStream;
import java.io.OutputStream;
import java.net.ServerSocket;
import java.net.Socket;

/** Takes messages of a known size and answers each with what available() said of it within a second. */
class Available {
    public static void main(String[] arguments) throws Exception {
        int size = Integer.parseInt(arguments[1]);
        byte[] message = new byte[size];
        try (ServerSocket listener = new ServerSocket(Integer.parseInt(arguments[0]))) {
            System.out.println("ready");
            while (true) {
                try (Socket connection = listener.accept()) {
                    DataInputStream in = new DataInputStream(connection.getInputStream());
                    OutputStream out = connection.getOutputStream();
                    while (true) {
                        out.write((announced(in) + "\n").getBytes());
                        in.readFully(message);
                        out.write("read\n".getBytes());
                    }
                } catch (java.io.EOFException end) {
                    // the client has what it wanted
                }
            }
        }
    }

    private static int announced(DataInputStream in) throws Exception {
        long deadline = System.nanoTime() + 1_000_000_000L;
        while (in.available() == 0 && System.nanoTime() < deadline) {
            Thread.sleep(1);
        }
        return in.available();
    }
}
